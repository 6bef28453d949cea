"""Databases as clients that remember what was acknowledged to them.

Each inserts one row a transaction. After a power loss, and in every snapshot, a database must be whole, and have all
rows up to some number: at least those that were acknowledged before, at most those that were asked for.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sqlite3
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from .conftest import run

FILLING_BYTES = 900
PATIENCE_SECONDS = 60


class Client(ABC):
    """A shell of a database that inserts rows, one a transaction, until it is stopped or its storage fails."""

    #: How the shell is told to say a word.
    echo: str

    def __init__(self) -> None:
        self.asked = self.acknowledged = 0

    @abstractmethod
    def work(self, stop: threading.Event) -> None:
        """Insert rows."""

    @abstractmethod
    def read(self, folder: Path) -> int:
        """The last row of the database in a folder, having checked that it is whole."""

    def _insert_rows(self, shell: list[str], beginning: str, stop: threading.Event) -> None:
        pipe = subprocess.PIPE
        with subprocess.Popen(shell, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(beginning)
                while not stop.is_set():
                    self.asked += 1
                    process.stdin.write(self._transaction(self.asked))
                    process.stdin.flush()
                    if process.stdout.readline() != f"done {self.asked}\n":
                        break
                    self.acknowledged = self.asked
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _transaction(self, number: int) -> str:
        filling = os.urandom(FILLING_BYTES // 2).hex()
        return (
            f"BEGIN; INSERT INTO rows VALUES ({number}, '{filling}');\n"
            f"UPDATE rows SET filling = '{filling}' WHERE number = {number // 2}; COMMIT;\n"
            f"{self.echo} done {number}\n"
        )

    def _note(self, count: int, last: int) -> int:
        assert count == last, "rows are missing in between"
        # What was not acknowledged may be there: the next number follows the last.
        self.asked = max(self.asked, last)
        return last


class SqliteClient(Client):
    """SQLite with every transaction synced, with a write-ahead log or a rollback journal."""

    echo = ".print"

    def __init__(self, folder: Path, journal_mode: str) -> None:
        super().__init__()
        self.folder = folder
        database = sqlite3.connect(folder / "data.db")
        assert database.execute(f"PRAGMA journal_mode={journal_mode}").fetchone() == (journal_mode,)
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, filling TEXT)")
        database.commit()
        database.close()

    def work(self, stop: threading.Event) -> None:
        shell = ["sqlite3", "-bail", "-batch", str(self.folder / "data.db")]
        self._insert_rows(shell, "PRAGMA synchronous=FULL;\n", stop)

    def read(self, folder: Path) -> int:
        database = sqlite3.connect(folder / "data.db")
        try:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            count, last = database.execute("SELECT count(*), coalesce(max(number), 0) FROM rows").fetchone()
        finally:
            database.close()
        return self._note(count, last)


def postgres_programs() -> Path:
    """Where the newest installed PostgreSQL has its programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    assert found, "PostgreSQL is not installed: contrib/setup test installs it"
    return found[-1].parent


def as_postgres(*command: object) -> None:
    """Run a program as the user that PostgreSQL insists on."""
    user = pwd.getpwnam("postgres")
    run(*command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/")


class PostgresServer:
    """A running server, and how to reach it."""

    def __init__(self, process: subprocess.Popen[bytes], sockets: Path) -> None:
        self.process = process
        self.sockets = sockets

    def command(self, program: str, *words: str) -> list[str]:
        """A client program of PostgreSQL, with where to connect."""
        return [str(postgres_programs() / program), "-h", str(self.sockets), "-U", "postgres", *words]

    def query(self, text: str) -> str:
        """The answer to a query, in a line."""
        return run(*self.command("psql", "-AtXq", "-v", "ON_ERROR_STOP=1", "-c", text)).stdout.strip()

    def wait_until_ready(self) -> None:
        """Wait for recovery to end."""
        for _ in range(PATIENCE_SECONDS * 20):
            if subprocess.run(self.command("pg_isready", "-q"), check=False).returncode == 0:
                return
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        raise AssertionError(self.log())

    def log(self) -> str:
        """What the server said."""
        return (self.sockets / "log").read_text()


@contextlib.contextmanager
def postgres_server(data: Path) -> Iterator[PostgresServer]:
    """A server for the database in a folder, run as its own user; stopped at once, without a checkpoint."""
    user = pwd.getpwnam("postgres")
    # In a short place: the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        sockets = Path(name)
        os.chown(sockets, user.pw_uid, user.pw_gid)
        options = (
            "listen_addresses=",
            f"unix_socket_directories={sockets}",
            "shared_buffers=16MB",
            "max_wal_size=64MB",
        )
        command = [str(postgres_programs() / "postgres"), "-D", str(data)]
        command += [word for option in options for word in ("-c", option)]
        with open(sockets / "log", "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/"
            )
        server = PostgresServer(process, sockets)
        try:
            server.wait_until_ready()
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(PATIENCE_SECONDS)


class PostgresClient(Client):
    """PostgreSQL as it comes, with checksums of its pages."""

    echo = "\\echo"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        user = pwd.getpwnam("postgres")
        (folder / "data").mkdir(mode=0o700)
        os.chown(folder / "data", user.pw_uid, user.pw_gid)
        options = (
            "--no-sync",
            "--no-locale",
            "--encoding=UTF8",
            "--auth=trust",
            "--data-checksums",
            "--username=postgres",
        )
        as_postgres(postgres_programs() / "initdb", "-D", folder / "data", *options)
        with postgres_server(folder / "data") as server:
            server.query("CREATE TABLE rows (number integer PRIMARY KEY, filling text)")
            server.query("CREATE EXTENSION amcheck")
        os.sync()

    def work(self, stop: threading.Event) -> None:
        with postgres_server(self.folder / "data") as server:
            self._insert_rows(server.command("psql", "-AtXq", "-v", "ON_ERROR_STOP=1"), "", stop)

    def read(self, folder: Path) -> int:
        with postgres_server(folder / "data") as server:
            run(*server.command("pg_amcheck", "--all", "--heapallindexed"))
            count, last = map(int, server.query("SELECT count(*), coalesce(max(number), 0) FROM rows").split("|"))
        return self._note(count, last)
