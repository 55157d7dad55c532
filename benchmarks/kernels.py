"""Every kernel at several real sizes: the least it could take, ours, plain torch, torch.compile and the named peers.

The least (`floor`) is the larger of bytes over the copy bandwidth measured here and of multiplications over the rate of a
matrix product measured here, in the same type. Entrants of a case take turns, round after round, in one process per case,
each once before the clock starts; medians. Memory is what the process held at its peak beyond what it held before the
call (on a GPU what torch's allocator did), over calls that begin with the inputs made.

Each case that was measured is a line of `--results`, and is not measured again unless `--again` says so; the tables, a file
for the CPU and one for the GPU beside it, are made of all lines. Without a GPU its table says that it is empty. `--peers
PYTHON` names an interpreter with torch, Triton and the peers, in which all entrants then run. `--only` takes beginnings of
kernels' names.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench

CASES = Path(__file__).parent / "kernel_cases"
COMPILED = "compiled"


Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", default="", help="beginnings of names, separated by commas")
    words.add_argument("--device", choices=["cpu", "cuda", "all"], default="all")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--seconds", type=float, default=60, help="about how long a case may take on a device")
    words.add_argument("--skip", default="", help="entrants to leave out, separated by commas")
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers too")
    words.add_argument("--results", type=Path, default=RESULTS)
    words.add_argument("--again", action="store_true", help="measure what is there already; tables show the newest")
    words.add_argument("--table", action="store_true", help="only make the tables of what is there")
    words.add_argument("--one", nargs=4, metavar=("KERNEL", "NUMBER", "DEVICE", "DTYPE"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.one:
        kernel, number, device, dtype = said.one
        print(json.dumps(measured(kernel, int(number), device, dtype, said)))
        return
    records = [json.loads(line) for line in said.results.read_text().splitlines()] if said.results.exists() else []
    for device in ["cpu", "cuda"] if said.device == "all" else [said.device]:
        why = "" if said.table else compare(device, said, records)
        shown = table(device, [record for record in records if record["device"] == device], why)
        said.results.with_name(f"{said.results.stem}-{device}.md").write_text(shown)
        print(shown, flush=True)


def compare(device: str, said: argparse.Namespace, records: list[Record]) -> str:
    """Measures what has no line yet; says why where nothing can be."""
    about = one_of(said, "machine", 0, device, "float32")
    if "error" in about:
        return str(about["error"])
    for kernel in sorted(file.stem for file in CASES.glob("[a-z]*.py")):
        if not any(kernel.startswith(word.strip()) for word in said.only.split(",")):
            continue
        for number, case in enumerate(importlib.import_module(f"kernel_cases.{kernel}").CASES):
            for dtype in case.dtypes if device in case.devices else ():
                named = {"kernel": kernel, "case": case.name, "dtype": dtype, "device": device}
                if not said.again and any(named.items() <= record.items() for record in records):
                    continue
                record = named | {"floor": floor(case, dtype, about), "goal": case.goal}
                record |= one_of(said, kernel, number, device, dtype)
                record |= {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "machine": bench.heading(), "about": about}
                records.append(record)
                with said.results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print("\n".join(rows(record)), file=sys.stderr, flush=True)
    return ""


def one_of(said: argparse.Namespace, kernel: str, number: int, device: str, dtype: str) -> Record:
    options = ["--rounds", str(said.rounds), "--seconds", str(said.seconds), "--skip", said.skip]
    ours = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return bench.child(
        said.peers, __file__, "--one", kernel, str(number), device, dtype, *options, environment=ours
    )  # fmt: skip


def floor(case: Any, dtype: str, about: Record) -> float:
    """Seconds below which this machine cannot do it."""
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    moved = case.bytes_moved / 4 * width + case.fixed_bytes
    return float(max(moved / about["bandwidth"], case.flops / about["rates"].get(dtype, 1e18)))


def table(device: str, records: Sequence[Record], why: str) -> str:
    if not records:
        return f"# Kernels on {device}\n\nNothing was measured yet{f': {why}' if why else ''}.\n"
    newest = {(one["kernel"], one["case"], one["dtype"]): one for one in records}
    abouts = {json.dumps(one["about"]["versions"]) + one["about"]["device"]: one["about"] for one in newest.values()}
    lines = [f"# Kernels on {'; '.join(sorted({about['device'] for about in abouts.values()}))}", ""]
    for about in abouts.values():
        rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in about["rates"].items())
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines += [
            f"{about['threads']} threads of torch; copy {about['bandwidth'] / 1e9:.1f} GB/s read and written, matrix "
            f"products {rates}; {versions}."
        ]
    lines += [
        "",
        "`x ours` is the time over ours; memory is added at the peak, over what was there before the call. Load: what else the",
        "machine was doing when a case began, of so many cores.",
        "",
        "| kernel | case | type | floor ms | entrant | ms | x floor | x ours | memory MB | goal | date, load |",
        "|---|---|---|--:|---|--:|--:|--:|--:|---|---|",
    ]
    return "\n".join(lines + [row for key in sorted(newest) for row in rows(newest[key])]) + "\n"


def rows(record: Record) -> list[str]:
    kernel, case, dtype, least, goal = (record[word] for word in ("kernel", "case", "dtype", "floor", "goal"))
    if "error" in record:
        return [f"| {kernel} | {case} | {dtype} | | failed: {record['error']} | | | | | {goal} | {record['date']} |"]
    ours = record["entrants"].get("ours", {}).get("seconds")
    when = f"{record['date']}, {record['machine'].partition('load ')[2].partition(',')[0]}"
    found = []
    for name, one in record["entrants"].items():
        first = not found
        told = f"| {kernel if first else ''} | {case if first else ''} | {dtype if first else ''} | "
        told += f"{least * 1e3:.3f} | " if first and least else "| "
        if "seconds" in one:
            above = f"{one['seconds'] / least:.1f}" if least else ""
            beside = f"{one['seconds'] / ours:.2f}" if ours else ""
            told += f"{name} | {one['seconds'] * 1e3:.3f} | {above} | {beside} | {one['memory'] / 1e6:.1f} |"
        else:
            told += f"{name} | {one['why']} | | | |"
        found.append(f"{told} {goal if first else ''} | {when if first else ''} |")
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
