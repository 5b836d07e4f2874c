"""What client and worker must agree on when they meet in the database.

The serializer is JSON, because DBOS' default is pickle, which would let whoever can write the database run code here.
The application version is a constant, because DBOS' default is a hash of the workflow's source, which would strand
every waiting job at the next release; raise it only when a job of the old version cannot be run by the new code.
"""

import logging

from dbos import DBOSPortableJSONSerializer
from sqlalchemy.engine import make_url

from service.log import adopt_logger

APPLICATION = "onebit"
APPLICATION_VERSION = "jobs-1"
QUEUE = "quantize"
WORKFLOW = "compress_model"
PROGRESS_EVENT = "progress"
SERIALIZER = DBOSPortableJSONSerializer()
POLLING_SECONDS = 0.5

EXPECTED_ENDS = ("JobFailed", "DBOSAwaitedWorkflowCancelledError", "DBOSWorkflowCancelledError", "CancelledError")


CONNECTION = {
    "client_encoding": "utf8",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""libpq's settings: text is text in a database of the encoding SQL_ASCII too (else psycopg returns bytes, over which
SQLAlchemy stumbles), and a database behind a cut cable is noticed within about 10 seconds."""


def is_sqlite(database_url: str) -> bool:
    """Whether the database is a file."""
    return database_url.startswith("sqlite")


def connection_url(database_url: str) -> str:
    """Return the URL with the settings above, unless it has its own."""
    if is_sqlite(database_url):
        return database_url
    url = make_url(database_url)
    return url.update_query_dict({**CONNECTION, **url.query}).render_as_string(hide_password=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop DBOS' tracebacks of jobs that failed or were cancelled in the ordinary way; their state tells it."""
    kind = record.exc_info[0] if record.exc_info else None
    cancelled = "was cancelled during execution" in record.getMessage() or "Aborting preemptible" in record.getMessage()
    return not cancelled and (kind is None or kind.__name__ not in EXPECTED_ENDS)


def adopt_dbos_logger() -> None:
    """Send DBOS' log through our handlers instead of its own."""
    adopt_logger("dbos")
    logging.getLogger("dbos").filters[:] = [_is_news]
