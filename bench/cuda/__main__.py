"""``python -m bench.cuda``: every benchmark on the GPU in one run, by worth, since the time may run out.

Each result is written to FILE.jsonl at once; at the end, however it comes, all go to FILE.json and most into a table.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import nce_ext
from bench.cuda import family, forward, host_memory, noise, optimizers, report, steps
from bench.cuda.measure import DoesNotFit, release
from bench.cuda.report import Recorder
from bench.cuda.run import Job, Run

SECTIONS: dict[str, Callable[[Run], Iterator[Job]]] = {
    "ceilings": forward.first_ceilings,
    "matmul": forward.products,
    "forward": forward.forward,
    "steps": steps.steps,
    "compiled": steps.compiled,
    "softmax": steps.softmax,
    "objectives": family.objectives,
    "epilogue": family.epilogue,
    "draws": noise.draws,
    "hogwild": steps.hogwild,
    "optimizers": optimizers.optimizers,
    "memory": noise.memory,
    "graphs": steps.graphs,
    "host-memory": host_memory.host_memory,
    "more-ceilings": forward.last_ceilings,
}


class DeviceLost(Exception):
    """No call on the device succeeds any more."""


def parse_options() -> argparse.Namespace:
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description="Measure nce_ext on a GPU.")
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path(f"bench/results/cuda-{today}.json"))
    parser.add_argument("--seconds", type=float, default=420, metavar="S", help="start no case after S; default 420")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: shows that all works, measures nothing")
    parser.epilog = "NAME is one of " + ", ".join(SECTIONS)
    return parser.parse_args()


def why_not(device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU; --device cpu --small shows that the program works"
    missing = nce_ext.build_info()["missing"].get(f"fused ({device})")
    return None if missing is None else f"there are no compiled kernels: {missing}"


received: list[str] = []  # an exception that a signal raises inside a finaliser is lost


def interrupt(signum: int, frame: object) -> None:
    received.append(signal.Signals(signum).name)
    raise KeyboardInterrupt(received[-1])


def measure(run: Run, names: list[str], deadline: float) -> list[str]:
    """Every case of the sections; returns those left out."""
    left_out: list[str] = []
    stopped = ""
    for name in (section for section in SECTIONS if section in names):
        run.recorder.section = name
        begun = time.monotonic()
        for job in SECTIONS[name](run):
            if received and not stopped:
                stopped = received[-1]
                run.recorder.error(job.work, KeyboardInterrupt(stopped))
            if stopped or time.monotonic() > deadline:
                left_out.append(f"{name}, {job.work}")
                continue
            try:
                measure_one(run, job)
            except (DeviceLost, KeyboardInterrupt) as error:
                stopped = str(error) or type(error).__name__
                run.recorder.error(job.work, error)
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
    return left_out


def measure_one(run: Run, job: Job) -> None:
    begun = time.monotonic()
    try:
        job.measure()
    except DoesNotFit as reason:
        run.recorder.skip(job.work, str(reason))
    except Exception as error:
        traceback.print_exc()
        run.recorder.error(job.work, error)
        error.__traceback__ = None  # its frames hold the tensors
    try:
        release(run.device)
    except RuntimeError as error:
        raise DeviceLost(str(error).splitlines()[0]) from None
    print(f"  {job.work}: {time.monotonic() - begun:.1f} s", flush=True)


def main() -> int:
    options = parse_options()
    begun = time.monotonic()
    if reason := why_not(options.device):
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    torch.manual_seed(20)
    warnings.filterwarnings("ignore", message="weight.grad will be dense")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    facts = report.facts(device, small=options.small)
    recorder = Recorder(options.output)
    left_out: list[str] = []
    gc.collect()
    gc.freeze()  # else every case would wait for a search through all that was imported
    try:
        left_out = measure(Run(device, options.small, recorder), options.only, begun + options.seconds)
    except KeyboardInterrupt as error:  # between two cases
        recorder.error("the run", error)
    finally:  # what was measured is kept, whatever happens
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        facts |= {"seconds": round(time.monotonic() - begun, 1), "after": report.gpu_state()}
        recorder.finish(facts, left_out)
        print("\n" + "\n".join(recorder.table(facts, left_out)), flush=True)
    return 1 if recorder.errors else 0


if __name__ == "__main__":
    sys.exit(main())
