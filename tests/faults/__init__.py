"""
Damaged inputs, kills, full disks and signals: `make test-faults`, or `python -m tests.faults`.

- mutations: damage to bytes, text, JSON values, archives and ONNX graphs, each given by a seed
- inputs: every kind of file that the program reads: a sound one, how it is damaged, and what reads it
- fuzz: damages inputs in a process of its own, with limits, and judges what the readers make of them
- kills, quick_job: the whole job, killed at events of writing and at any time, and run again
- conditions: full disks, signals, closed outputs, two runs in a folder
"""
