"""What the GPU peers share: timing as in the project's own kernel benchmark, and the file that they write.

A case is captured into a CUDA graph that runs it over several sets of inputs, together larger than the L2 cache; graphs are
replayed between two events, and the median of the replays counts. Without a GPU (--device cpu) nothing is captured and times
mean nothing: that only shows that the script runs.
"""

import json
import statistics
import subprocess
import time

import torch

L2_MULTIPLE = 4  # bytes of all input sets together, in L2 sizes
MIN_REPLAYS, MAX_REPLAYS = 7, 200


def parser(description):
    import argparse

    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run")
    p.add_argument("--only", default="", help="cases whose name contains this")
    p.add_argument("--seconds", type=float, default=0.3, help="time spent on replays of each case")
    p.add_argument("--json", help="write the results to this file")
    return p


class Bench:
    """Times cases on one device and collects the results."""

    def __init__(self, args, title):
        self.args, self.results = args, []
        self.device = torch.device(args.device)
        self.gpu = self.device.type == "cuda"
        if self.gpu:
            torch.cuda.set_device(self.device)
            properties = torch.cuda.get_device_properties(self.device)
            self.name, self.l2 = properties.name, properties.L2_cache_size
        else:
            self.name, self.l2 = "cpu (times mean nothing)", 1 << 16
        print(f"{title}: torch {torch.__version__} on {self.name}", flush=True)

    def wanted(self, name):
        return self.args.only in name

    def sets(self, num_bytes, most=64):
        """How many input sets of `num_bytes` bytes are larger than the L2 cache together."""
        return max(2, min(most, -(-L2_MULTIPLE * self.l2 // max(1, num_bytes))))

    def seconds(self, run, calls):
        """Seconds of one of the `calls` calls that `run()` makes."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / calls
        graph = capture(run)
        times, began = [], time.perf_counter()
        while len(times) < MIN_REPLAYS or (time.perf_counter() - began < self.args.seconds and len(times) < MAX_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times) / calls

    def report(self, name, seconds, num_bytes=0, flops=0, **more):
        rate = []
        if flops:
            rate.append(f"{flops / seconds / 1e12:8.1f} TFLOP/s")
        if num_bytes:
            rate.append(f"{num_bytes / seconds / 1e9:8.1f} GB/s")
        print(f"{name:44s} {seconds * 1e6:12.1f} us  {'  '.join(rate)}", flush=True)
        self.results.append({"name": name, "seconds": seconds, "bytes": num_bytes, "flops": flops, **more})

    def skip(self, name, reason):
        reason = " ".join(str(reason).split())[:300]
        print(f"{name:44s} skipped: {reason}", flush=True)
        self.results.append({"name": name, "skipped": reason})

    def attempt(self, name, measure):
        """Runs `measure` for a wanted case; what this version of PyTorch refuses is reported, not hidden."""
        if not self.wanted(name):
            return
        try:
            measure(name)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, ImportError) as error:
            self.skip(name, f"{type(error).__name__}: {error}")
            # Leaves no half-made capture and no memory behind for the next case.
            if self.gpu:
                torch.cuda.synchronize()
        if self.gpu:
            torch.cuda.empty_cache()

    def write(self, **more):
        if not self.args.json:
            return
        facts = {"device": self.name, "torch": torch.__version__, "meaningful": self.gpu and not self.args.tiny, **more}
        if self.gpu:
            facts["driver"] = driver()
        with open(self.args.json, "w") as file:
            json.dump({**facts, "results": self.results}, file, indent=1)


def capture(run):
    """A CUDA graph of what `run` launches, warmed up first on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
