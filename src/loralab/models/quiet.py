"""One message of bitsandbytes that is no news to anyone who uses loralab."""

from __future__ import annotations

from logging import Filter, LogRecord, getLogger

_LOGGER = "bitsandbytes.backends.cpu.ops"
_ADVICE = "Failed to load CPU gemm_4bit_forward from kernels-community"


class _Hide(Filter):
    def filter(self, record: LogRecord) -> bool:
        return not str(record.msg).startswith(_ADVICE)


def hide_kernel_advice() -> None:
    """Keep bitsandbytes from advising, at its import, a package that would download a kernel.

    It says so on every processor with AVX512-BF16, and PEFT imports it whether weights are
    quantised or not. Its own kernel does the work. All its other messages are let through.
    """
    logger = getLogger(_LOGGER)
    if not any(isinstance(present, _Hide) for present in logger.filters):
        logger.addFilter(_Hide())
