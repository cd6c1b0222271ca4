"""What a user may choose: SDGPConfig, Schedule, and the names of methods and patterns."""

from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.config.schedule import Schedule

__all__ = ["SDGPConfig", "Schedule", "check_config"]
