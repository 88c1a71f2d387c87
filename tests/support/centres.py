"""A GWS, a Noojee and a Click2Dial, all simulated in this process, and settings to dial by all of them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from listener.settings import Api, Click2DialPbx, Environment, Limits, NoojeePbx, Operations, Settings, Store
from listener.simulator.centre import Simulator
from listener.simulator.click2dial import Click2DialServer
from listener.simulator.noojee import NoojeeServer
from listener.simulator.settings import SimulatorSettings
from tests.support.running import account

TOKEN = "token-of-the-tests"
API_KEY = "simulated-key"


@dataclass
class Centres:
    """The three of them."""

    gws: Simulator
    noojee: NoojeeServer
    click2dial: Click2DialServer
    redis_url: str
    lines: int
    """Extensions of each PBX."""

    @property
    def extensions(self) -> dict[str, str]:
        """Noojee's, with their accounts."""
        return {str(number): f"desk{number}" for number in range(101, 101 + self.lines)}

    @property
    def desks(self) -> dict[str, str]:
        """Click2Dial's, with their accounts."""
        return {str(number): f"c2d{number}" for number in range(2001, 2001 + self.lines)}

    def settings(self, dsn: str, *, limits: Mapping[str, Any] | None = None, **fields: Any) -> Settings:
        """Settings by which all of them are heard and may be dialled."""
        return Settings(
            **{
                "store": Store(dsn=SecretStr(dsn)),
                "environments": {"lab": Environment(base_url=self.gws.url, dials=True)},
                "accounts": tuple(account(login) for login in self.gws.accounts),
                "noojee": {
                    "office": NoojeePbx(
                        base_url=self.noojee.url,
                        api_key=SecretStr(API_KEY),
                        extensions=self.extensions,
                        dials=True,
                    )
                },
                "click2dial": {
                    "c2d": Click2DialPbx(
                        base_url=self.click2dial.url,
                        redis_url=SecretStr(self.redis_url),
                        webhook_token=SecretStr(TOKEN),
                        extensions=self.desks,
                        dials=True,
                    )
                },
                "api": Api(port=0, token=SecretStr(TOKEN)),
                "operations": Operations(port=0),
                "limits": Limits(**{"stop_s": 5.0, **(limits or {})}),
                **fields,
            }
        )

    def toml(self, dsn: str, limits: str = "") -> str:
        """The same as a configuration file, for a child."""

        def table(extensions: Mapping[str, str]) -> str:
            return "{ " + ", ".join(f'"{key}" = "{value}"' for key, value in extensions.items()) + " }"

        accounts = "".join(
            f'[[accounts]]\nenvironment = "lab"\nlogin = "{login}"\npassword = "simulated"\n'
            for login in self.gws.accounts
        )
        return f"""
[store]
dsn = "{dsn}"
spool_dir = "spool"
[environments.lab]
base_url = "{self.gws.url}"
dials = true
{accounts}
[noojee.office]
base_url = "{self.noojee.url}"
api_key = "{API_KEY}"
extensions = {table(self.extensions)}
dials = true
[click2dial.c2d]
base_url = "{self.click2dial.url}"
redis_url = "{self.redis_url}"
extensions = {table(self.desks)}
dials = true
[api]
port = 0
token = "{TOKEN}"
[operations]
port = 0
[limits]
stop_s = 5
{limits}
"""


@asynccontextmanager
async def centres(
    redis_url: str,
    *,
    accounts: int = 3,
    lines: int = 3,
    scale: float = 0.01,
    seed: int = 1,
    noojee: Mapping[str, Any] | None = None,
    click2dial: Mapping[str, Any] | None = None,
    **gws: Any,
) -> AsyncIterator[Centres]:
    """All three, for as long as the block lasts; delays of their scripts are multiplied by `scale`."""
    async with AsyncExitStack() as stack:
        settings = SimulatorSettings(accounts=accounts, seed=seed, dial_time_scale=scale, dialect="v2", **gws)
        made = Centres(
            await stack.enter_async_context(Simulator(settings)),
            await stack.enter_async_context(
                NoojeeServer(api_key=API_KEY, time_scale=scale, seed=seed, **(noojee or {}))
            ),
            await stack.enter_async_context(
                Click2DialServer(redis_url=redis_url, time_scale=scale, seed=seed, **(click2dial or {}))
            ),
            redis_url,
            lines,
        )
        yield made
