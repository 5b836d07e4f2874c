"""Lines of the quality CSV name texts, not the folders they lie in."""

from benchmarks.quality import without_folders


def test_calibration_is_recordedwithout_folders():
    """Wherever a text is named: in the list, and as a key of what is said about each."""
    record = {
        "text": ["/home/a/news.txt", "self:"],
        "samples": 32,
        "fingerprints": {"/home/a/news.txt": "ab", "self:": "cd"},
        "fingerprint_covers": {"/home/a/news.txt": "text", "self:": "windows"},
    }
    assert without_folders(record) == {
        "text": ["news.txt", "self:"],
        "samples": 32,
        "fingerprints": {"news.txt": "ab", "self:": "cd"},
        "fingerprint_covers": {"news.txt": "text", "self:": "windows"},
    }
