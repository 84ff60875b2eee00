"""What a refusal of the hub, the line or the disk means to a person who can act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zimage_engine.errors import DownloadError, InvalidRequest


def refuse_bad_id(model_id: str, error: BaseException) -> None:
    """Raise InvalidRequest if huggingface_hub's error says that the id is not written like one."""
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        raise InvalidRequest(
            f"a model id is written owner/name, such as Tongyi-MAI/Z-Image-Turbo; got {model_id!r}", "model"
        ) from error


#: By the name of the error's class; the nearest in its class order counts, so rows need no order.
HUB_REFUSALS: dict[str, str] = {
    "GatedRepoError": (
        "{model_id} is gated: open {endpoint}/{model_id} in a browser, accept its terms, and set HF_TOKEN"
        " to a token of that account"
    ),
    "RepositoryNotFoundError": (
        "there is no model {model_id} at {endpoint}, or it is private: check the spelling (owner/name), and"
        " for a private one set HF_TOKEN to a token that may read it"
    ),
    "RevisionNotFoundError": (
        "{model_id} has no revision {revision}: give --revision a branch, a tag or a full commit that its"
        " page lists, or leave it out for main"
    ),
    "DisabledRepoError": "{model_id} was closed by its owner or by {endpoint}; choose another model",
    "RemoteEntryNotFoundError": (
        "a file that {endpoint} announced for {model_id} is not there ({reason}); try later, or another"
        " mirror"
    ),
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it and run this again",
    "HTTPError": (
        "could not reach {endpoint} ({reason}): check the network and the proxy, or set HF_ENDPOINT to a"
        " mirror that can be reached"
    ),
    "OSError": "could not write the model to the disk ({reason})",
}

#: For answers that carry no more than a status.
STATUS_REFUSALS: dict[int, str] = {
    401: "{endpoint} did not accept the token in HF_TOKEN; make a new one there, or unset it",
    403: "{endpoint} does not let this account read {model_id}: open its page and ask for access",
    404: (
        "{endpoint} does not know {model_id}, or is not a model hub: check the id, and HF_ENDPOINT if it"
        " is set"
    ),
    429: "{endpoint} asks for patience after too many requests; run this again in a few minutes",
}


@contextmanager
def hub_errors_as_sentences(model_id: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn what the hub, the line and the disk raise into DownloadError with a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HTTPError, OSError) as failed:
        row = next(kind.__name__ for kind in type(failed).__mro__ if kind.__name__ in HUB_REFUSALS)
        sentence = HUB_REFUSALS[row]
        if isinstance(failed, HfHubHTTPError) and row == "HTTPError":
            status = failed.response.status_code
            sentence = STATUS_REFUSALS.get(
                status, f"{{endpoint}} answered {status} ({{reason}}); try again later"
            )
        reason = (str(failed) or type(failed).__name__).strip().splitlines()[0]
        raise DownloadError(
            sentence.format(model_id=model_id, revision=revision, endpoint=endpoint, reason=reason)
        ) from failed
