"""A job for each file: one member polls, workers on any number of hosts do the work (procrastinate, PostgreSQL).

Tables, once: `procrastinate --app=orders_queue.app schema --apply`, and orders_queue.sql.
The member: `FTPCOORD_HANDLER=orders_queue:enqueue`. Each worker: `procrastinate --app=orders_queue.app worker`.
All of them have ORDERS_DSN (the database) and ORDERS_SHARED (a folder on storage that all of them mount).

`done` in the ledger then means "in the queue". The queue may hold a job twice: a handler that is cut off behind its
`defer` runs again (`attempt` 2), and a worker that dies leaves its job to another one. So the row of (path, size,
mtime) and the effect are one transaction.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import procrastinate
import psycopg

if TYPE_CHECKING:
    import ftpcoord

DSN = os.environ["ORDERS_DSN"]
SHARED = Path(os.environ["ORDERS_SHARED"])
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DSN))
opening = threading.Lock()


def enqueue(file: ftpcoord.File) -> None:
    """In the active member: the content goes to the shared folder of its version, then the job into the queue."""
    import ftpcoord  # workers need not have it

    version = (file.path, file.size, str(file.mtime))
    folder = SHARED / hashlib.sha256(repr(version).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    content = file.save(folder)
    try:
        with opening:
            app.open()
        path, size, mtime = version
        import_orders.defer(path=path, size=size, mtime=mtime, attempt=file.attempt, content=str(content))
    except (psycopg.OperationalError, procrastinate.exceptions.ConnectorException):
        raise ftpcoord.TryLater() from None  # the queue is away: not the file's fault


@app.task(name="import_orders", queue="orders", retry=5)
def import_orders(path: str, size: int, mtime: str, attempt: int, content: str) -> None:
    """In a worker, perhaps twice: the row of the version and the effect are one transaction."""
    with psycopg.connect(DSN) as database:
        mark = "INSERT INTO orders_done VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
        if database.execute(mark, (path, size, mtime)).rowcount:
            with open(content, newline="") as rows:
                for row in csv.DictReader(rows):
                    database.execute("INSERT INTO orders VALUES (%(number)s, %(amount)s)", row)
    shutil.rmtree(Path(content).parent, ignore_errors=True)
