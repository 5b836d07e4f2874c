"""What a job may say of its training is what the core knows of it."""

import dataclasses
from typing import get_args, get_type_hints

from onebit_core.qat import TrainingConfig
from service.api.admin.schemas import TrainingBody

ONE_PROCESS = {"shard"}
"""Not of a job, which is one process."""


def test_a_job_can_say_whatever_the_core_knows():
    """Every setting, and with the same words."""
    ours, cores = get_type_hints(TrainingBody), get_type_hints(TrainingConfig)
    assert set(ours) - {"model_config"} == {field.name for field in dataclasses.fields(TrainingConfig)} - ONE_PROCESS
    words = {name: [each for part in get_args(kind) for each in get_args(part)] for name, kind in ours.items()}
    spoken = {name: known for name, known in words.items() if known and all(isinstance(word, str) for word in known)}
    assert spoken.keys() >= {"teacher", "sign_optimizer", "surrogate", "scales", "dtype"}
    for name, known in spoken.items():
        assert set(known) == set(get_args(cores[name])), name
