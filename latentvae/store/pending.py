"""A shard whose moments are being computed: what is kept of others, and what comes from the model."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from latentvae.base.errors import ImageError, NoMemoryError
from latentvae.store import format as layout
from latentvae.store.format import Entry, Failure, Row
from latentvae.store.planning import ShardWork

NOT_FINITE = "{} gives moments that are NaN or infinite: encode in a precision of wider range (fp32, bf16)"


@dataclass
class Pending:
    """A shard whose moments are still being computed."""

    name: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    computing: list[tuple[list[Entry], Future[list[Row]]]] = field(default_factory=list)

    def collect(self) -> None:
        """Wait for the moments; images whose moments are not finite have failed."""
        for entries, future in self.computing:
            try:
                rows = future.result()
            except NoMemoryError as error:  # the others go on; a later run tries these again
                self.failures += [failure_of(entry, error) for entry in entries]
                continue
            for row in rows:
                if row.is_finite:
                    self.rows.append(row)
                else:
                    self.failures.append(
                        failure_of(row.entry, ImageError(NOT_FINITE.format(row.entry.source)))
                    )


def begun(work: ShardWork) -> Pending:
    """A shard with what is kept of others."""
    rows = [
        row
        for holder, entries in work.entries
        if entries
        for row in layout.read_rows(holder.folder, holder.record.name, entries)
    ]
    return Pending(work.name, rows, work.failures)


def failure_of(entry: Entry, error: ImageError) -> Failure:
    """An image that could not be encoded; without a hash, so that later runs try it, where memory was why."""
    sha256 = None if isinstance(error, NoMemoryError) else entry.sha256
    return Failure(entry.key, entry.source, sha256, entry.size_bytes, entry.mtime_ns, str(error))
