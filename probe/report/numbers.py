"""The numbers of reports as text, see `probe.digits`."""

from probe.digits import NOT_RESOLVED, interval_text, number_text, plain_words, with_error

__all__ = ["NOT_RESOLVED", "interval_text", "number_text", "plain_words", "with_error"]
