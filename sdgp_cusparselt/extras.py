"""Optional packages of the ``train`` extra, imported only when a run needs them."""

import importlib
from types import ModuleType

from sdgp_cusparselt.errors import SDGPError

#: Packages of the ``train`` extra, so that one command brings all; from a clone no index is needed.
TRAIN_PACKAGES = ("scikit-learn", "mlxtend", "matplotlib", "pillow", "transformers")


class MissingPackageError(SDGPError, ModuleNotFoundError):
    """A package of the ``train`` extra is not installed; the message names the pip command."""


def require(module: str, *, package: str, purpose: str) -> ModuleType:
    """Import ``module``, or say which package to install for ``purpose``.

    Args:
        module: dotted name to import, such as ``sklearn.datasets``.
        package: name of the distribution on the package index, such as ``scikit-learn``.
        purpose: what needs it, such as ``the digits task``.

    Returns:
        The imported module.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which is not installed. Run: "
            f"pip install {' '.join(dict.fromkeys((package, *TRAIN_PACKAGES)))}",
            name=error.name,
        ) from error
