"""Whether an artifact is measured on text that it was calibrated or trained on, which makes it look better than it is.

Compared are the files that both read, as far as they are here, and the fingerprints of whole texts, which also find
the same text under another name. Where both name the same files, the fingerprint of the whole text decides if there
is one: the file may hold another text by now. Not found is text that a data set larger than 16 Mi characters shares
with another file, since its fingerprint covers only the windows drawn from it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from onebit_core.calibration.overlap import overlapping_sources
from onebit_core.calibration.sources import read_text, source_files
from onebit_core.errors import CalibrationError


def known_text(calibration: Mapping[str, Any], training: Mapping[str, Any], source: str) -> str | None:
    """Say that a source was calibrated or trained on.

    Args:
        calibration: what the manifest says about calibration.
        training: what it says about training.
        source: an evaluation text that can be read.

    Returns:
        One sentence, or None if no overlap is known.
    """
    fingerprint = hashlib.sha256(read_text(source).encode()).hexdigest()
    trainings = [(record, "trained") for record in (training, *training.get("earlier", []))]
    for record, word in ((calibration, "calibrated"), *trainings):
        name = _overlap(record, source, fingerprint)
        if name is not None:
            return f"the model was {word} on this text ({name}): the figures are better than on other text"
    return None


def _overlap(record: Mapping[str, Any], source: str, fingerprint: str) -> str | None:
    """Return the name of a recorded text that the source, of that fingerprint, is."""
    fingerprints, covers = record.get("fingerprints", {}), record.get("fingerprint_covers", {})
    for name, known in fingerprints.items():
        is_decided = covers.get(name, "text") == "text" and _is_one_file(name, source)
        if known == fingerprint or (not is_decided and overlapping_sources([name], [source])):
            return str(name)
    return None


def _is_one_file(one: str, other: str) -> bool:
    """Tell whether two sources are read from the same single file, so that comparing fingerprints says all."""
    try:
        return source_files(one) == source_files(other) and len(source_files(one)) == 1
    except CalibrationError:
        return False
