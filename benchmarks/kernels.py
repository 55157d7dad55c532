"""Every kernel at several real sizes: the least it could take, ours, plain torch, torch.compile and the named peers.

The least (`floor`) is the larger of bytes over the copy bandwidth measured here and of multiplications over the rate of a
matrix product measured here, in the same type. Entrants of a case take turns, round after round, in one process per case,
each once before the clock starts; medians. Memory is what the process held at its peak beyond what it held before the
call (on a GPU what torch's allocator did), over calls that begin with the inputs made.

Without a GPU the columns of one stay empty, and the table says so. `--results FOLDER` keeps the table of each device as
kernels-cpu.md or kernels-cuda.md. `--only` takes beginnings of kernels' names.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench

CASES = Path(__file__).parent / "kernel_cases"
COMPILED = "compiled"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", default="", help="beginnings of names, separated by commas")
    words.add_argument("--device", choices=["cpu", "cuda", "all"], default="all")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--seconds", type=float, default=60, help="about how long a case may take on a device")
    words.add_argument("--skip", default="", help="entrants to leave out, separated by commas")
    words.add_argument("--results", type=Path, help="a folder for the tables")
    words.add_argument("--one", nargs=4, metavar=("KERNEL", "NUMBER", "DEVICE", "DTYPE"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.one:
        kernel, number, device, dtype = said.one
        print(json.dumps(measured(kernel, int(number), device, dtype, said)))
        return
    for device in ["cpu", "cuda"] if said.device == "all" else [said.device]:
        table = compare(device, said)
        print(table, flush=True)
        if said.results:
            said.results.mkdir(parents=True, exist_ok=True)
            (said.results / f"kernels-{device}.md").write_text(table)


def compare(device: str, said: argparse.Namespace) -> str:
    about = bench.child(sys.executable, __file__, "--one", "machine", "0", device, "float32")
    if "error" in about:
        return f"# Kernels on {device}\n\nNothing was measured: {about['error']}\n"
    lines = [
        f"# Kernels on {about['device']}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {bench.heading()}, {about['threads']} threads of torch.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
        f"Copy {about['bandwidth'] / 1e9:.1f} GB/s (read and written); matrix products "
        + ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in about["rates"].items())
        + ".",
        "`x ours` is the time over ours; memory is added at the peak, over what was there before the call.",
        "",
        "| kernel | case | type | floor ms | entrant | ms | x floor | x ours | memory MB | goal |",
        "|---|---|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for kernel in sorted(file.stem for file in CASES.glob("[a-z]*.py")):
        if not any(kernel.startswith(word.strip()) for word in said.only.split(",")):
            continue
        for number, case in enumerate(importlib.import_module(f"kernel_cases.{kernel}").CASES):
            for dtype in case.dtypes if device in case.devices else ():
                options = ["--rounds", str(said.rounds), "--seconds", str(said.seconds), "--skip", said.skip]
                answer = bench.child(
                    sys.executable, __file__, "--one", kernel, str(number), device, dtype, *options
                )  # fmt: skip
                lines += rows(kernel, case, dtype, answer, about)
                print("\n".join(lines[-len(answer.get("entrants", "1")) :]), file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def rows(kernel: str, case: Any, dtype: str, answer: dict[str, Any], about: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [f"| {kernel} | {case.name} | {dtype} | | failed: {answer['error']} | | | | | {case.goal} |"]
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    moved = case.bytes_moved / 4 * width + case.fixed_bytes
    floor = max(moved / about["bandwidth"], case.flops / about["rates"].get(dtype, 1e18))
    ours = answer["entrants"].get("ours", {}).get("seconds")
    found = []
    for name, one in answer["entrants"].items():
        first = not found
        told = f"| {kernel if first else ''} | {case.name if first else ''} | {dtype if first else ''} | "
        told += f"{floor * 1e3:.3f} | " if first and floor else "| "
        if "seconds" in one:
            above = f"{one['seconds'] / floor:.1f}" if floor else ""
            beside = f"{one['seconds'] / ours:.2f}" if ours else ""
            told += f"{name} | {one['seconds'] * 1e3:.3f} | {above} | {beside} | {one['memory'] / 1e6:.1f} |"
        else:
            told += f"{name} | {one['why']} | | | |"
        found.append(told + f" {case.goal if first else ''} |")
    return found


# one case, in a process of its own


def measured(kernel: str, number: int, device: str, dtype: str, said: argparse.Namespace) -> dict[str, Any]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here")
    if kernel == "machine":
        return machine(device)
    torch.manual_seed(0)
    case = importlib.import_module(f"kernel_cases.{kernel}").CASES[number]
    entrants = {name: work for name, work in case.make(device, dtype).items() if name not in said.skip.split(",")}
    found: dict[str, dict[str, Any]] = {}
    for name in list(entrants):
        try:
            once = timed(entrants[name], device)
            found[name] = {"times": [], "memory": added(entrants[name], device), "once": once}
        except ImportError as reason:
            found[name] = {"why": f"not installed: {reason}"}
        except Exception as reason:  # a peer that cannot do this size is a line of the table, not its end
            found[name] = {"why": f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"[:80]}
            if name == "ours":
                raise
    running = [name for name in entrants if "times" in found[name]]
    began = time.perf_counter()
    for turn in range(said.rounds):
        for name in running:
            if turn == 0 or time.perf_counter() - began < said.seconds:
                found[name]["times"].append(timed(entrants[name], device))
    for name in running:
        found[name]["seconds"] = statistics.median(found[name].pop("times"))
    return {"entrants": found, "facts": case.facts}


def timed(work: Any, device: str) -> float:
    """Seconds of one call; short ones are repeated, so that the clock and the launch do not count."""
    import torch

    def once() -> float:
        if device != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    first = once()
    times = max(1, min(50, int(0.02 / max(first, 1e-6))))
    return statistics.median([once() for _ in range(times)])


def added(work: Any, device: str) -> int:
    """Bytes a call held at its peak beside what was held before it; its result counts."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        del result
        return int(torch.cuda.max_memory_allocated()) - before
    bench.forget_peak()
    before = bench.held()
    result = work()
    most = bench.peak()
    del result
    return max(0, most - before)


def machine(device: str) -> dict[str, Any]:
    """What a copy and a matrix product reach here: a floor is stated in what this machine can do."""
    import torch
    import triton

    one = torch.ones(1 << (26 if device == "cpu" else 29), device=device)
    two = torch.empty_like(one)
    copied = min(timed(lambda: two.copy_(one), device) for _ in range(5))
    rates = {}
    for dtype in ("float32", "bfloat16", *(["float16"] if device == "cuda" else [])):  # few CPUs have halves
        side = 1536 if device == "cpu" else 8192
        a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        rates[dtype] = 2 * side**3 / min(timed(lambda a=a: a @ a, device) for _ in range(3))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"the CPU: {bench.chip()}",
        "threads": torch.get_num_threads(),
        "bandwidth": 2 * one.nbytes / copied,
        "rates": rates,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


if __name__ == "__main__":
    main()
