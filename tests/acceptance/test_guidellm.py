"""guidellm drives our server from one request at a time to all it can take, and comes to the end without an error.

It is the load generator that others measure servers with; it is not a dependency, for it wants other versions of ours.
`make soak` installs it into a folder of its own.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import ROOT, running_server, server_environment

pytestmark = [pytest.mark.acceptance, pytest.mark.soak]

OWN_ENVIRONMENT = ROOT / "build" / "guidellm" / "bin" / "guidellm"
STRATEGIES = 5
"""One at a time, as many as it can take, and rates between them."""
REQUESTS = 40


@pytest.fixture
def guidellm(is_soak):
    """The program, in soak only: a sweep takes minutes."""
    if not is_soak:
        pytest.skip("only in `make soak`: takes minutes")
    program = OWN_ENVIRONMENT if OWN_ENVIRONMENT.exists() else shutil.which("guidellm")
    if program is None:
        pytest.skip("guidellm is not installed (`make soak` installs it)")
    return Path(program)


def test_a_sweep_comes_to_its_end(guidellm, tiny_artifact, soak_folder, tmp_path):
    """Every strategy has its requests, none failed, and each answer is as long as was asked for."""
    report = soak_folder / "guidellm.json"
    with running_server(str(tiny_artifact), "--kv-cache-bytes", "64000000", log_file=tmp_path / "log") as server:
        command = [str(guidellm), "run", "--backend", f"kind=openai_http,target={server.url},model=tiny"]
        command += ["--profile", f"kind=sweep,sweep_size={STRATEGIES}"]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--tokenizer", f"kind=hf_auto,model={tiny_artifact}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"]
        command += ["--output", f"kind=json,path={report}"]
        done = subprocess.run(
            command,
            env=server_environment(HF_HUB_OFFLINE="1"),
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert LiveMetrics(server.url).total("onebit_kv_cache_usage_ratio") == 0
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert len(benchmarks) == STRATEGIES
    for one in benchmarks:
        requests = one["requests"]
        assert len(requests["successful"]) > 0
        assert requests["errored"] == []
