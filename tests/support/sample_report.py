"""A manifest and a report as a real quantization would leave them, for tests of what shows them."""

from onebit_core.artifact.manifest import (
    Accuracy,
    BitsInfo,
    EvaluationResult,
    LayerReport,
    Manifest,
    Perplexity,
    Report,
    SourceInfo,
    TaskResult,
)

PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def sample_manifest() -> Manifest:
    """Return the manifest of a 4-bit artifact."""
    return Manifest(
        format_version=1,
        name="sample-gptq",
        method="gptq",
        settings={"bits": 4, "group_size": 64},
        source=SourceInfo(
            model="/models/sample.gguf", sha256="cd" * 32, architecture="LlamaForCausalLM", parameters=134_515_008
        ),
        calibration={"text": ["news.txt"], "samples": 32, "tokens": 1024, "seed": 0},
        versions={"onebit": "0.1.0", "torch": "2.13.0"},
        created="2026-01-02T03:04:05+00:00",
        bits=BitsInfo(linear_true=4.31, linear_nominal=4.0, whole_model=6.77),
        bytes_by_part={"signs": 0, "codes": 53_100_000, "scales": 4_100_000, "embedding": 56_600_000},
        sha256="ef" * 32,
    )


def sample_report() -> Report:
    """Return a report with two blocks and one evaluation; the last layer is the worst."""
    layers = tuple(
        LayerReport(
            name=f"model.layers.{block}.{name}",
            block=block,
            projection=name.rpartition(".")[2],
            method="gptq",
            bits=4.31,
            weight_error=0.01 * (1 + index),
            output_error=0.001 * (1 + index + block),
            seconds=0.5,
        )
        for block in range(2)
        for index, name in enumerate(PROJECTIONS)
    )
    return Report(layers=layers, seconds={"quantize": 4.0}, evaluation=(sample_evaluation(),))


def sample_evaluation(dataset: str = "wikitext2") -> EvaluationResult:
    """Return one evaluation."""
    return EvaluationResult(
        dataset=dataset,
        fingerprint="ab" * 32,
        windows=60,
        window_tokens=2048,
        tokens=122_820,
        original=Perplexity(value=20.85, standard_error=0.61),
        compressed=Perplexity(value=24.47, standard_error=0.74),
        kl_mean=0.21,
        kl_standard_error=0.003,
        kl_median=0.11,
        kl_p99=1.4,
        kl_max=9.1,
        top1_agreement=0.81,
        top1_standard_error=0.003,
        device="cpu (x86_64)",
        dtype="float32",
        date="2026-01-02T03:04:05+00:00",
        versions={"onebit": "0.1.0"},
    )


def sample_task(task: str = "arc_easy") -> TaskResult:
    """Return the result of one zero-shot task."""
    return TaskResult(
        task=task,
        fingerprint="12" * 32,
        questions=400,
        available=2376,
        chance=0.25,
        original=Accuracy(value=0.5825, standard_error=0.0247),
        compressed=Accuracy(value=0.5575, standard_error=0.0249),
        difference_standard_error=0.0113,
        original_norm=Accuracy(value=0.5125, standard_error=0.025),
        compressed_norm=Accuracy(value=0.4975, standard_error=0.025),
        agreement=0.875,
        agreement_standard_error=0.0166,
        device="cpu (x86_64)",
        dtype="float32",
        date="2026-01-02T03:04:05+00:00",
        versions={"onebit": "0.1.0", "lm_eval": "0.4.13"},
    )
