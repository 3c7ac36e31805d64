"""Reaching a given scheduler: its address, our certificates, and what is wrong if it is silent."""

import ssl
from collections.abc import Iterator
from pathlib import Path

from dask import config
from distributed import Client
from distributed.comm.addressing import parse_address
from distributed.comm.registry import get_backend
from distributed.security import Security

from aeheight.errors import InputError

_CERTIFICATES = ("ca-file", "client.cert", "client.key")
"""Dask's settings under distributed.comm.tls that a driver needs."""


def reach(scheduler: str, patience: float, otherwise: str) -> Client:
    """An open client of a scheduler; for `tls://` with the certificates of Dask's settings.

    Args:
        scheduler: such as `tcp://host:8786` or `tls://host:8786`.
        patience: seconds to wait for an answer.
        otherwise: the remedy where nobody answers.

    Raises:
        InputError: nobody answers there, or one of both does not trust the other.
    """
    try:
        scheme, place = parse_address(scheduler)
        get_backend(scheme).get_address_host(place)  # refuses what is no address
    except ValueError as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler} ({error}); {otherwise}"
        ) from error
    _check(scheduler, scheme)
    try:
        return Client(scheduler, timeout=patience)
    except (OSError, ValueError) as error:
        told = next((str(cause) for cause in _causes(error) if str(cause)), repr(error))
        raise InputError(
            f"no Dask scheduler answers at {scheduler} ({told}); "
            + (_remedy(scheduler, error) or otherwise)
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _remedy(scheduler: str, error: BaseException) -> str | None:
    """What to look at, where the answer was no."""
    scheme, place = parse_address(scheduler)
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError(verify_code=10):  # X509_V_ERR_CERT_HAS_EXPIRED
                return "its certificate has expired: make another, and start what uses it anew"
            case ssl.SSLCertVerificationError():
                named = config.get("distributed.comm.tls.ca-file", None)
                return (
                    f"{_variable('ca-file')} must name the CA that signed the scheduler's, and "
                    f"names {named}"
                )
            case ssl.SSLError(reason="WRONG_VERSION_NUMBER") | ValueError():
                # Tornado's ValueError where the other side has greeted us first, in plain words.
                return f"it does not speak TLS: try tcp://{place}"
            case ssl.SSLError() | ConnectionResetError() if scheme == "tls":
                variable = _variable("client.cert")
                return f"it hung up, as on a certificate of another CA than its own: see {variable}"
            case ConnectionResetError():
                return f"it hung up, as one does that speaks TLS: try tls://{place}"
    return None


def _check(scheduler: str, scheme: str) -> None:
    """Meet what Dask answers with a traceback.

    Raises:
        InputError: names the setting.
    """
    if scheme == "tcp" and config.get("distributed.comm.require-encryption"):
        raise InputError(
            f"{scheduler} is not encrypted, and Dask's settings ask for it "
            "(DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION): give --scheduler "
            f"tls://{parse_address(scheduler)[1]}"
        )
    if scheme == "tls":
        _check_certificates(scheduler)


def _check_certificates(scheduler: str) -> None:
    """They are named, there, and fit each other.

    Raises:
        InputError: names the setting.
    """
    named = {part: config.get(f"distributed.comm.tls.{part}", None) for part in _CERTIFICATES}
    if unset := [_variable(part) for part, path in named.items() if not path]:
        raise InputError(
            f"{scheduler} speaks TLS and asks for a certificate; set {', '.join(unset)} to its file"
        )
    for part, path in named.items():
        if "\n" not in path and not Path(path).is_file():  # else the certificate itself
            raise InputError(f"{_variable(part)} names {path}, which is no file here")
    try:
        Security().get_connection_args("client")
    except OSError as error:  # ssl.SSLError is one
        raise InputError(
            f"the certificates for {scheduler} cannot be used ({error}): look at "
            + ", ".join(f"{_variable(part)}={path}" for part, path in named.items())
        ) from error


def _variable(part: str) -> str:
    """The environment variable of a setting of distributed.comm.tls."""
    return "DASK_DISTRIBUTED__COMM__TLS__" + part.replace("-", "_").replace(".", "__").upper()
