"""The product in one go: quantize the sample model, show what it cost, serve it, ask it something.

    make demo                       # or: make demo ARGS="--no-serve"

Everything is done with the commands a user would type; each is printed before it runs. The recipe is the one that, of
all we measured, has the fewest bits with which the sample model still writes English (README, "Results").
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from onebit_core.model.sample import sample_model_path

RECIPE = ("--method", "gptq", "--set", "bits=3", "--set", "search=true", "--embedding-bits", "8")
NAME = "smollm2-demo"
PROMPT = "The capital of France is"
READY_SECONDS = 180


def main() -> None:
    """Quantize, evaluate, inspect, serve."""
    options = parse_arguments()
    artifact = options.folder / NAME
    if artifact.exists() and options.again:
        shutil.rmtree(artifact)
    if not artifact.exists():
        texts = [word for text in options.calibration for word in ("--calibration", text)]
        work = ["--work-dir", str(options.folder / "work")]
        run("quantize", str(sample_model_path()), *RECIPE, *texts, *work, "--name", NAME, "--out", str(artifact))
        shutil.rmtree(options.folder / "work")
    texts = [word for text in options.text for word in ("--text", text)]
    run("evaluate", str(artifact), *texts, "--windows", str(options.windows))
    run("inspect", str(artifact), "--html", str(options.folder / "report.html"))
    if not options.no_serve:
        serve(artifact, options.port)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything goes")
    parser.add_argument("--again", action="store_true", help="quantize again if the artifact is there")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="TEXT", help="default: the text that comes with Python"
    )
    parser.add_argument("--text", action="append", metavar="NAME=TEXT", help="evaluation texts")
    parser.add_argument("--windows", type=int, default=6, help="windows of 2048 tokens to evaluate")
    parser.add_argument("--port", type=int, default=8000, help="where the server listens")
    parser.add_argument("--no-serve", action="store_true", help="stop after the report")
    options = parser.parse_args()
    options.text = options.text or ["python-docs=builtin:python-heldout"]
    return options


def command(program: str, *words: str) -> list[str]:
    """Return the installed command beside this Python."""
    return [str(Path(sys.executable).parent / program), *words]


def run(*words: str) -> None:
    """Show and run one onebit command; stop with its exit code if it fails."""
    print(f"\n$ onebit {shlex.join(words)}", flush=True)
    done = subprocess.run(command("onebit", *words), check=False)
    if done.returncode:
        sys.exit(done.returncode)


def serve(artifact: Path, port: int) -> None:
    """Start the server, ask it one question, and leave it running until interrupted."""
    words = [str(artifact), "--port", str(port)]
    print(f"\n$ onebit-serve {shlex.join(words)}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server below must not outlive us
    server = subprocess.Popen(command("onebit-serve", *words))
    try:
        wait_until_ready(server, port)
        body = json.dumps({"model": NAME, "prompt": PROMPT, "max_tokens": 32, "temperature": 0})
        url = f"http://127.0.0.1:{port}/v1/completions"
        print(f"\n$ curl {url} -H 'Content-Type: application/json' -d '{body}'", flush=True)
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            completion = json.load(answer)
        print(json.dumps(completion, indent=1))
        print(
            f"\n{PROMPT}{completion['choices'][0]['text']}\n\nThe server is running; stop it with Ctrl-C.", flush=True
        )
        server.wait()
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait for the model to be loaded; exit if the server does."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"the server was not ready after {READY_SECONDS} seconds")


if __name__ == "__main__":
    main()
