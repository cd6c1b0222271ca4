"""Hooks of mkdocs: the version and the repository of the site, and fences that are not run."""

import os
import re
from typing import Any

from sdgp_cusparselt.versions import __version__

#: ```` ```sh no-run: reason ````: the tests read it; the site's Markdown takes it for no fence.
NO_RUN = re.compile(r"^```(\w+) no-run: (.+)$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Add the version, and the repository where a build knows it (GitHub's runners do)."""
    config.site_name = f"{config.site_name} {__version__}"
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        config.repo_url = f"{server}/{repository}"
        config.repo_name = repository
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show above a block why the tests do not run it."""
    return NO_RUN.sub(lambda m: f'```{m[1]} title="{m[2].replace(chr(34), "")}"', markdown)
