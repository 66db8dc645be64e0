"""sparkproof judges whether a machine can fine-tune language models, correctly and fast."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sparkproof")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+uninstalled"
