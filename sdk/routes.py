"""What a stated quality means for a generation of this bundle: which exits the device has, and who watches over them."""

from __future__ import annotations

from dataclasses import dataclass

from edgecloud.bundle import Bundle
from edgecloud.calibration import Calibration
from edgecloud.cost import Exited
from edgecloud.edge.divergence import Watch
from edgecloud.edge.exits import Exits
from edgecloud.errors import ConfigError
from edgecloud.options import GenerationOptions
from edgecloud.quality import CloudShare, Risk
from edgecloud.sampling import SamplingSettings


@dataclass(frozen=True, slots=True)
class Route:
    """Of one generation."""

    exits: Exits | None = None  # None: every token is the target's
    watch: Watch | None = None
    exited: Exited | None = None  # what the calibration saw of token exits


class Routes:
    """Of one client: its watches live as long as it does."""

    def __init__(self) -> None:
        self._watches: dict[tuple[str, float, float], Watch] = {}

    def route(self, options: GenerationOptions, bundle: Bundle) -> Route:
        """For these options.

        Raises:
            ConfigError: the bundle is not calibrated for what is asked. BundleError: it holds another pair's calibration.
        """
        quality, sampling = options.quality, options.sampling
        if not isinstance(quality, Risk | CloudShare):
            return Route()
        calibration = Calibration.of(bundle)
        _check_sampling(sampling)
        if isinstance(quality, CloudShare):
            assert quality.scope != "token"
            threshold = calibration.share_threshold(quality.scope, quality.share, sampling.temperature)
            return Route(Exits(quality.scope, threshold, seed=sampling.seed, audit_rate=0.0))
        watch = self._watch(quality, sampling.temperature, calibration)
        if watch.threshold is None:
            return Route()
        rule = calibration.rule(quality.scope, quality.risk, sampling.temperature)
        exits = Exits(quality.scope, watch.threshold, seed=sampling.seed)
        return Route(exits, watch, Exited(rule.exit_share, rule.divergence) if quality.scope == "token" else None)

    def _watch(self, quality: Risk, temperature: float, calibration: Calibration) -> Watch:
        key = quality.scope, quality.risk, temperature
        if key not in self._watches:
            if quality.scope == "token":
                calibrated = calibration.token_threshold(quality.risk, temperature)
            else:
                calibrated = calibration.request_threshold(quality.scope, quality.risk, temperature)
            stricter = {
                rule.threshold
                for rule in calibration.rules
                if rule.scope == quality.scope and rule.temperature == temperature and rule.risk < quality.risk
                if rule.threshold is not None and rule.threshold > calibrated
            }
            self._watches[key] = Watch(quality.risk, [calibrated, *sorted(stricter)], calibration.delta)
        return self._watches[key]


def _check_sampling(sampling: SamplingSettings) -> None:
    """Risks are calibrated by temperature alone. Raises ConfigError: something else bends the choice."""
    plain = SamplingSettings()
    bending = ("repetition_penalty",) if sampling.greedy else ("top_k", "top_p", "repetition_penalty")
    for name in bending:
        if (value := getattr(sampling, name)) != (default := getattr(plain, name)):
            raise ConfigError(
                f"{name} is {value!r}; a risk or cloud share is calibrated for {default!r}: leave it, or ask for 'exact'"
            )
