"""A hook of mkdocs: the version that the site describes stands beside its name."""

from typing import Any

from sdgp_cusparselt.versions import __version__


def on_config(config: Any) -> Any:
    config.site_name = f"{config.site_name} {__version__}"
    return config
