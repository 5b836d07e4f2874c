"""An artifact on paper: manifest, report and tokenizer, but no weights; enough for everything but an engine."""

import dataclasses
import json
from pathlib import Path

from onebit_core.artifact.manifest import (
    BitsInfo,
    LayerReport,
    Manifest,
    Perplexity,
    Report,
    SourceInfo,
)
from tests.support.sample_report import sample_evaluation
from tests.support.tiny_model import byte_tokenizer

VERSIONS = {"onebit": "0.1.0", "torch": "2", "transformers": "5", "python": "3.11"}


def paper_manifest(name: str = "paper") -> Manifest:
    return Manifest(
        format_version=1,
        name=name,
        method="rtn",
        settings={"bits": 4},
        source=SourceInfo(model="m", sha256="5" * 64, architecture="LlamaForCausalLM", parameters=1000),
        calibration={},
        versions=VERSIONS,
        created="2026-01-01T00:00:00+00:00",
        bits=BitsInfo(linear_true=4.25, linear_nominal=4.0, whole_model=6.5),
        bytes_by_part={"codes": 500, "scales": 32, "full_precision": 280},
        sha256="a" * 64,
    )


def paper_report() -> Report:
    layer = LayerReport(
        name="model.layers.0.self_attn.q_proj",
        block=0,
        projection="q_proj",
        method="rtn",
        bits=4.25,
        weight_error=0.04,
        output_error=0.09,
        seconds=0.1,
    )
    result = dataclasses.replace(
        sample_evaluation("news"),
        tokens=126,
        original=Perplexity(value=20.0, standard_error=0.5),
        compressed=Perplexity(value=25.0, standard_error=0.6),
        kl_mean=0.2,
        kl_standard_error=0.01,
        kl_median=0.1,
        kl_p99=1.5,
        kl_max=3.0,
        top1_agreement=0.8,
        date="2026-01-01T00:00:00+00:00",
    )
    return Report(layers=(layer,), seconds={"quantize": 1.0}, evaluation=(result,))


def write_paper_artifact(folder: Path, name: str = "paper") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(paper_manifest(name).to_dict()))
    (folder / "report.json").write_text(json.dumps(paper_report().to_dict()))
    byte_tokenizer().save_pretrained(folder)
    return folder
