"""What readers raise and warn of."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or the source, and the remedy."""


class MalformedRecord(DataError):
    """A record that does not have its format's shape; the message names file, record, field and remedy."""


class SkippedRecords(UserWarning):
    """How many malformed records, or questions of theirs, were passed over, and why the first one."""
