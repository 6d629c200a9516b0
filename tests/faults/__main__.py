"""
Damages what the program reads, kills what it does, and writes what came of it.

    python -m tests.faults --inputs 25000 --kills 50 -o benchmarks/results/faults

Exit status: 0 if nothing was found, 1 if something was; each fault is in the files written, with the seed and the
number that make it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from benchmarks.measuring.environment import read_environment
from deploy.contract import package_versions
from deploy.files import write_json
from tests.faults import conditions, inputs
from tests.faults.campaign import Summary, counts_of_faults, fuzzed, make_bench
from tests.faults.kills import Chain, Job, killed_jobs, make_work

PER_CHAIN = 10
"""Kills of a job before it is let through."""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="Damage, kill, and see what comes of it."
    )
    parser.add_argument(
        "--inputs", type=int, default=25_000, metavar="N", help="damaged inputs, of all kinds together (%(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", metavar="NAME", help="only these kinds of inputs")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first input of each kind (%(default)s)"
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of the whole job (%(default)s)")
    parser.add_argument(
        "--signals", type=int, default=1, metavar="N", help="times each signal is sent to each command (%(default)s)"
    )
    parser.add_argument("--only", choices=("inputs", "kills", "conditions"), help="one part of the three")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other faults (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for inputs.json, kills.json, ..."
    )
    arguments = parser.parse_args(argv)
    words = ["python", "-m", "tests.faults", *(argv if argv is not None else sys.argv[1:])]
    found = 0
    with tempfile.TemporaryDirectory(prefix="faults.") as folder:
        for part, run in PARTS.items():
            if arguments.only in (None, part):
                start, found_here = time.monotonic(), 0
                for document in run(Path(folder), arguments):  # what there is so far
                    elapsed_s = round(time.monotonic() - start)
                    document.update(command=words, seed=arguments.seed, elapsed_s=elapsed_s, **where())
                    write_json(arguments.output / f"{part}.json", document)
                    found_here = document["faults"]
                    print(f"{part}: {document['sentence']}, {elapsed_s} s", flush=True)
                found += found_here
    return 1 if found else 0


def where() -> Dict[str, Any]:
    """Versions and machine, for the record."""
    told = ("cpu", "cores_usable", "memory_mib", "os", "commit")
    environment = read_environment()
    return {"versions": package_versions(), "environment": {key: environment[key] for key in told}}


def fuzz_all(folder: Path, arguments: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """Takes damaged inputs of every kind."""
    bench = folder / "bench"
    make_bench(bench)
    shutil.copytree(bench, bench.with_name(f"{bench.name}.kept"))
    with inputs.in_folder(bench):
        kinds = [kind for kind in inputs.kinds() if not arguments.kinds or kind.name in arguments.kinds]
    here = [kind for kind in kinds if inputs.has_packages(kind)]
    for kind in kinds:
        if kind not in here:
            print(f"{kind.name}: left out, since {', '.join(kind.needs)} are not installed")
    summaries: List[Summary] = []
    for kind in here:
        summaries.append(fuzzed(bench, kind, arguments.seed, -(-arguments.inputs // len(here)), arguments.first))
        total = sum(summary.inputs for summary in summaries)
        yield {
            "faults": sum(len(summary.faults) for summary in summaries),
            "sentence": f"{kind.name}; so far {total} damaged inputs, {counts_of_faults(summaries) or 'no faults'}",
            "kinds": [dataclasses.asdict(summary) for summary in summaries],
        }


def kill_all_over(folder: Path, arguments: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """Kills the whole job again and again."""
    chains: List[Chain] = []
    for chain in killed_jobs(folder / "job", arguments.seed, arguments.kills, PER_CHAIN):
        chains.append(chain)
        kills = [kill for one in chains for kill in one.kills]
        survived = sum(not kill.fault and not chains[kill.chain].fault for kill in kills)
        yield {
            "faults": len(kills) - survived,
            "sentence": f"{survived} of {len(kills)} kills survived, in {len(chains)} jobs",
            "kills": [dataclasses.asdict(kill) for kill in kills],
            "ends": [one.fault for one in chains],
        }


def try_conditions(folder: Path, arguments: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """Full disks, signals, outputs that nobody reads, devices, two at once."""
    bench, job = folder / "conditions", folder / "job"
    make_bench(bench)
    found: List[conditions.Trial] = []
    for place, commands in ((bench, conditions.COMMANDS), (job, conditions.TRAINING)):
        if place == job and not job.exists():
            make_work(job)
            Job(job, "undisturbed").run()
        found += conditions.trials(place, commands, arguments.seed, arguments.signals)
        faults = [trial for trial in found if trial.fault]
        yield {
            "faults": len(faults),
            "sentence": f"{len(found)} trials of {len({trial.command for trial in found})} commands, "
            f"{len(faults)} faults",
            "trials": [dataclasses.asdict(trial) for trial in found],
        }


PARTS = {"inputs": fuzz_all, "kills": kill_all_over, "conditions": try_conditions}
"""Part -> what runs it in a folder, and yields its record as it grows."""

if __name__ == "__main__":
    sys.exit(main())
