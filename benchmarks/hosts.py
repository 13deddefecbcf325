"""Two machines that share nothing but a cable: what a round costs on it, and what is lost when a machine dies.

    python benchmarks/hosts.py                  # as root on Linux, with ip and unshare; about 4 minutes
    python benchmarks/hosts.py --kills 30       # and one of the two killed at random moments, so often

Each machine is a namespace of the kernel: own copy of the code, own folder, own processes, own name and network device,
its only way out a cable to the other one (--delay, --rate: by tc). Printed are, for three runs on the built-in text,
seconds a round on one machine and on two, bytes over the cable a round, and these over twice theta a client; then the
time from cutting the cable until the other machine has said so.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import Parser, UsageError, non_negative_float, non_negative_int, positive_float, run_main

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--dataset demo --threads 1 --amp off --output-dir {out} --run-name r"
MAMBA = f"mamba_fl/fed_avg.py {SMALL} --tokenizer bpe:2048 --d-model 64 --sequence-length 64 --local-updates 4 "
MAMBA += "--num-clients 8 --val-sequences 8 --client-val-sequences 0 --val-freq 5 --rounds 20"
NONIID = f"llm_noniid/train.py {SMALL} --model tiny --tokenizer bpe:2048 --num-clients 8 --max-samples 400 "
NONIID += "--local-steps 4 --eval-samples 40 --eval-every 5 --num-rounds 20"
RUNS = {
    "mamba_fl, FedAvg, moments of each client, all 8": MAMBA,
    "mamba_fl, the same, 4 of 8": f"{MAMBA} --participation 0.5",
    "llm_noniid, SCAFFOLD on LoRA, 4 of 8": f"{NONIID} --algorithm scaffold --participation-rate 0.5",
}


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--kills", type=non_negative_int, default=0, metavar="N", help="kills of a machine")
    parser.add_argument("--delay", type=non_negative_float, default=1.0, metavar="X", help="ms that a packet takes")
    parser.add_argument("--rate", type=positive_float, default=1.0, metavar="X", help="of the cable, Gbit/s")
    parser.add_argument("--seed", type=non_negative_int, default=1, metavar="N", help="of the moments of the kills")
    return parser


def sh(line, check=True):
    done = subprocess.run(line.split(), capture_output=True, text=True)
    if check and done.returncode:
        raise UsageError(f"{line}: {done.stderr.strip()}: this needs Linux, root, iproute2 and util-linux")
    return done


@contextlib.contextmanager
def cable(delay, rate):
    """Two namespaces and a cable between them."""
    names = [f"fedquartet{os.getpid()}_{i}" for i in range(2)]
    try:
        for name in names:
            sh(f"ip netns add {name}")
        sh(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for i, name in enumerate(names):
            sh(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev eth0")
            sh(f"ip -n {name} link set lo up")
            sh(f"ip -n {name} link set eth0 up")
            line = f"ip netns exec {name} tc qdisc add dev eth0 root netem delay {delay}ms rate {rate}gbit"
            if sh(line, check=False).returncode and not i:
                print("no tc with netem here: the cable has no delay", file=sys.stderr)
        yield names
    finally:
        for name in names:
            sh(f"ip netns del {name}", check=False)


class Hosts:
    """The two machines. Args: place: a folder for all of theirs; names: of the namespaces."""

    def __init__(self, place, names):
        self.place, self.names = place, names
        for i in range(2):
            skip = shutil.ignore_patterns(".*", "results", "__pycache__", "tests")
            shutil.copytree(ROOT, place / f"host{i}" / "code", ignore=skip)

    def start(self, line, run, *more):
        """The processes of `line` on both, its output in the folder `run` of the first."""
        port, started = str(random.randrange(20000, 60000)), []
        for i, name in enumerate(self.names):
            home = self.place / f"host{i}"
            words = [*line.format(out=home / run).split(), "--processes", "0", *more]
            env = {**os.environ, "PYTHONPATH": str(home / "code"), "GLOO_SOCKET_IFNAME": "eth0", "RANK": str(i)}
            env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "FEDQUARTET_CACHE": f"{home}/cache"}
            env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": port}
            apart = f"ip netns exec {name} unshare --pid --fork --kill-child --mount-proc --uts"
            inside = ["sh", "-c", f'hostname host{i}; exec "$@"', "sh", sys.executable, *words]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*apart.split(), *inside], cwd=home / "code", env=env, **pipes))
        return started

    def bytes(self):
        """What has gone over the cable, both ways."""
        about = json.loads(sh(f"ip -n {self.names[0]} -s -j link show dev eth0").stdout)[0]["stats64"]
        return about["rx"]["bytes"] + about["tx"]["bytes"]

    def lines(self, run):
        path = self.place / "host0" / run / "r" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def served(self, run):
        """What tells two runs apart: losses, and the bytes of final/."""
        final = sorted((self.place / "host0" / run / "r" / "final").rglob("*.safetensors"))
        return [line["val_loss"] for line in self.lines(run)], [path.read_bytes() for path in final]

    def wait(self, started):
        """How they ended: (code, last line of stderr)."""
        for one in started:
            one.last = (one.communicate()[1].splitlines() or [""])[-1]
        return [(one.returncode, one.last) for one in started]

    def until(self, run, lines, started):
        while len(self.lines(run)) < lines and all(one.poll() is None for one in started):
            time.sleep(0.05)


def seconds_a_round(line):
    """Without evaluations. Args: line: the last of metrics.jsonl."""
    return line["tokens"] / line["tokens_per_second"] / line["round"]


def measure(hosts):
    print("| run | s a round, one machine | two | MB over the cable a round | over 2 x theta a client |")
    print("|---|---|---|---|---|")
    for i, (label, line) in enumerate(RUNS.items()):
        alone = f"{line} --processes 1".format(out=hosts.place / "host0" / f"alone{i}").split()
        env = {**os.environ, "FEDQUARTET_CACHE": f"{hosts.place}/host0/cache"}
        subprocess.run([sys.executable, *alone], check=True, capture_output=True, cwd=ROOT, env=env)
        before = hosts.bytes()
        ended = hosts.wait(hosts.start(line, f"two{i}"))
        if any(code for code, _ in ended):
            raise SystemExit(f"{label}: {ended}")
        sent, last = hosts.bytes() - before, hosts.lines(f"two{i}")[-1]
        assert hosts.served(f"two{i}") == hosts.served(f"alone{i}"), f"{label}: other bits"
        assert not (hosts.place / "host1" / f"two{i}").exists(), "the second machine has written"
        one, two = seconds_a_round(hosts.lines(f"alone{i}")[-1]), seconds_a_round(last)
        theta = last["bytes_up"] + last["bytes_down"]
        megabytes = sent / last["round"] / 1e6
        print(f"| {label} | {one:.2f} | {two:.2f} | {megabytes:.2f} | {sent / theta:.2f} |", flush=True)


def cut(hosts):
    started = hosts.start(next(iter(RUNS.values())), "cut")
    hosts.until("cut", 2, started)
    sh(f"ip -n {hosts.names[1]} link set eth0 down")
    began = time.monotonic()
    hosts.wait(started[:1])
    seconds = time.monotonic() - began
    hosts.wait(started[1:])
    sh(f"ip -n {hosts.names[1]} link set eth0 up")
    print(f"\nThe cable cut: after {seconds:.0f} s the first machine ended.", flush=True)
    for one in started:
        print(f"    exit code {one.returncode}: {one.last}", flush=True)


def kills(hosts, number, seed):
    draw, lost, slowest, struck = random.Random(seed), 0, 0.0, 0
    for i in range(number):
        which, (label, line), run = draw.randrange(2), draw.choice(list(enumerate(RUNS.values()))), f"killed{i}"
        started = hosts.start(line, run)
        hosts.until(run, draw.randrange(1, 5), started)
        time.sleep(draw.random())
        struck += started[which].poll() is None
        started[which].send_signal(signal.SIGKILL)
        began = time.monotonic()
        ended = hosts.wait(started)
        slowest = max(slowest, time.monotonic() - began)
        said = ended[1 - which][1]
        again = hosts.wait(hosts.start(line, run, "--resume"))
        right = f"process {which} on host{which}" in said or ended[which][0] == 0
        if not right or any(code for code, _ in again) or hosts.served(run) != hosts.served(f"two{label}"):
            lost += 1
            print(f"lost: kill {i} of host{which}: {ended}, then {again}", file=sys.stderr, flush=True)
        shutil.rmtree(hosts.place / "host0" / run, ignore_errors=True)
    print(f"\nKills of a machine: {number}, {struck} before the run was over; lost: {lost}.")
    print(f"The other one ended within {slowest:.0f} s.")


def main(args):
    with tempfile.TemporaryDirectory() as place, cable(args.delay, args.rate) as names:
        hosts = Hosts(Path(place), names)
        measure(hosts)
        cut(hosts)
        if args.kills:
            kills(hosts, args.kills, args.seed)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
