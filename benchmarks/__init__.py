"""
Numbers and verdicts: how accurate and how fast the very file is that ships, and whether to roll it out.

Commands: accuracy, latency, report, fleet. Then the rooms, each of which imports only those that follow it:

- studies: commands that measure this project itself; nothing of the product imports them, nor they its commands.
- boards: the list of boards, SSH to them, and what measures on them.
- reporting: from result files to the report: its document, its page, the verdict.
- measuring: what is measured, on what, and how sure it is: result files, timing, environment, power, COCO metrics.

Ground: toml_file. Nothing here imports torch or mmdet; what needs them is run as a process (`deploy.commands`).
"""
