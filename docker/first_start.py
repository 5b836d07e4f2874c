"""What a first start needs and nobody has made yet: a key, a small model, the database's password.

    first_start.py             a key, shown by `key`; and an artifact of the sample model where the image has that model
    first_start.py key         print the key that was made
    first_start.py database    a password for PostgreSQL and the URL that holds it

Compose runs the first before the server and the last before the database (docker/compose.yaml). What is there already
is left alone, so each may run at every start. Secrets are written to volumes that only their readers mount: the key is
in a volume of its own that no server ever sees; the server reads hashes. Nothing secret is printed into a log.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path

from onebit_core.errors import OnebitError
from onebit_core.model.sample import sample_model_path
from service.auth import Scope, add_key

KEYS = Path("/keys/keys.json")
FIRST_KEY = Path("/first-key/key")
DATABASE = Path("/database-secrets")
DEMO = Path("/artifacts/demo")
RECIPE = ("--method", "rtn", "--set", "bits=4", "--embedding-bits", "8")
"""The recipe that is done soonest and still writes English; `make demo` makes a better model in more time."""


def main() -> int:
    """Run the command line."""
    match sys.argv[1:]:
        case []:
            make_key()
            choose_database()
            return make_demo()
        case ["key"]:
            print(FIRST_KEY.read_text().strip() if FIRST_KEY.exists() else "no key was made here")
        case ["database"]:
            make_database_secrets()
        case other:
            print(f"error: unknown arguments {other}; see the first lines of {__file__}", file=sys.stderr)
            return 2
    return 0


def make_key() -> None:
    """Make a key of both scopes, unless there is a keys file."""
    if KEYS.exists():
        print(f"{KEYS} is there")
        return
    key = add_key(KEYS, "first-start", frozenset(Scope))
    write_secret(FIRST_KEY, key, mode=0o400)
    print("made an API key; to see it: docker compose -f docker/compose.yaml --profile cpu run --rm first-start key")


def choose_database() -> None:
    """Leave an empty URL, which means an SQLite file, unless `database` has written one."""
    if DATABASE.is_dir() and not (DATABASE / "url").exists():
        write_secret(DATABASE / "url", "", mode=0o444)


def make_database_secrets() -> None:
    """Make a password and the URL with it. PostgreSQL runs as another user, so others in this volume may read."""
    if (DATABASE / "password").exists():
        print("the database has a password")
        return
    password = secrets.token_urlsafe(32)
    write_secret(DATABASE / "url", f"postgresql://onebit:{password}@database:5432/onebit", mode=0o444)
    write_secret(DATABASE / "password", password, mode=0o444)
    print("made a password for the database")


def write_secret(path: Path, text: str, mode: int) -> None:
    """Write a file that is whole, with its mode, from the moment it has its name."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    temporary.replace(path)


def make_demo() -> int:
    """Quantize the sample model, if this image has it and nobody did before."""
    if DEMO.exists():
        print(f"{DEMO} is there")
        return 0
    try:
        model = sample_model_path()
    except OnebitError:
        print("this image has no sample model; the server starts with what ONEBIT_ARTIFACTS names")
        return 0
    words = ["onebit", "quantize", str(model), *RECIPE, "--name", "demo", "--out", str(DEMO)]
    return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
