"""Which engine draws a language model's completions: the option `decoder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdag.endpoints.api_key import api_key_of
from sysdag.endpoints.http_client import HttpClient, check_url
from sysdag.errors import EndpointError, PlanError

LOCAL, CONTINUOUS = "local", "continuous"


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server that holds the model, as the value of `CausalLM(decoder=...)`.

    It must take prompts as token ids and return the token ids and log-probabilities of completions, as vLLM (0.10.2 or
    newer) and SGLang (0.5.23) do at `/v1/completions`. What it returns is checked against the model that is here.

    Attributes:
        url: its base, as `http://127.0.0.1:8000/v1`.
        model: as the server calls it; by default the only model that it serves. The name of an adapter that it has
            loaded goes for this component's own adapter. Without one, the adapter is written to `adapter_dir` and
            loaded by the server, under a name made of its weights, whenever they have changed.
        api_key_env: the environment variable that holds its key. None sends no key, whatever the environment holds.
        timeout: seconds without an answer after which a request has failed.
        max_retries: further tries of a request, with growing waits.
        concurrency: requests at once.
        checked_draws: of each call, how many draws are also read by the model here; 0 checks none, and needs no weights
            here.
        tolerance: nats a token by which the log-probabilities of those may differ, on the mean of absolute values.
        score_draws: computes `Draw.log_prob` of every draw with the model here; otherwise it is None, and
            ImportanceSampling is refused.
        adapter_dir: a folder that the server reads, too; by default one for temporary files.

    Raises:
        PlanError: for a URL that cannot be used, or an option out of range.
    """

    url: str
    model: str | None = None
    api_key_env: str | None = None
    timeout: float = 600.0
    max_retries: int = 6
    concurrency: int = 32
    checked_draws: int = 2
    tolerance: float = 0.1
    score_draws: bool = False
    adapter_dir: str | Path | None = None

    def __post_init__(self) -> None:
        try:
            check_url(self.url)
        except EndpointError as error:
            raise PlanError(f"decoder: {error}") from None
        if self.timeout <= 0 or self.tolerance <= 0 or self.concurrency < 1:
            raise PlanError(
                "Server needs timeout > 0, tolerance > 0 and concurrency >= 1, got "
                f"{self.timeout}, {self.tolerance} and {self.concurrency}."
            )
        if self.max_retries < 0 or self.checked_draws < 0:
            raise PlanError(
                f"Server needs max_retries >= 0 and checked_draws >= 0, got {self.max_retries} and "
                f"{self.checked_draws}."
            )

    @property
    def needs_weights(self) -> bool:
        """Whether draws are read by the model that is here."""
        return self.checked_draws > 0 or self.score_draws

    def client(self) -> HttpClient:
        """What asks it, for one call.

        Raises:
            EndpointError: for a key that is not there, or belongs to another service.
        """
        key = api_key_of(self.api_key_env, self.url)
        return HttpClient(url=self.url, api_key=key, timeout=self.timeout, max_retries=self.max_retries)


Decoder = str | Server


def chosen_decoder(given: Any) -> Decoder:
    """`local`, `continuous`, or a `Server`, of which the URL is enough.

    Raises:
        PlanError: for anything else.
    """
    if isinstance(given, Server) or given in (LOCAL, CONTINUOUS):
        return given
    if isinstance(given, str) and given.startswith(("http://", "https://")):
        return Server(given)
    raise PlanError(
        f"decoder must be 'local', 'continuous', a server's URL as 'http://127.0.0.1:8000/v1', or "
        f"sysdag.components.Server(...), got {given!r}."
    )


def kind_of(decoder: Any) -> str:
    """What a record of a run says of a decoder: never a URL or a key."""
    return "server" if isinstance(decoder, Server) else str(decoder)
