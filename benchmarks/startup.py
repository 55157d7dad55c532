"""How long `hilum --help` takes, beside an interpreter that does nothing and one that imports torch: medians of five."""

import statistics
import subprocess
import sys
import time

import bench

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "hilum --help": [sys.executable, "-m", "pipeline", "--help"],
    "hilum train --help": [sys.executable, "-m", "pipeline", "train", "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    print(bench.heading())
    spent: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(5):
        for name, words in COMMANDS.items():  # in turn, so that a busy minute hits all alike
            started = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            spent[name].append(time.perf_counter() - started)
    least = statistics.median(spent["python -c 'import torch'"])
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        print(f"{name:<26} {median:6.2f} s   {median / least:5.2f} of importing torch")


if __name__ == "__main__":
    main()
