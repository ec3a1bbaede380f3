"""The repository that a run is pushed to: who may write there and what it holds, asked before training."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token, hf_hub_download, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainingArguments

from trl_llava.configs.recipe import Recipe, RecipeLoader
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.errors import InputError
from trl_llava.hub.lookup import UNREACHABLE
from trl_llava.publish.shareable import is_machine_path, shareable_recipe
from trl_llava.run.output_dir import RECIPE_FILE, differences

logger = logging.getLogger(__name__)

# How a run saves and logs says nothing about which run it is.
_NOT_COMPARED = ("hub_", "push_to_hub", "save_", "logging_", "report_to", "disable_tqdm", "run_name", "log_level")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"


class HubError(InputError):
    """A repository that this run cannot be pushed to."""

    exit_status = 2


@dataclass
class Repository:
    """Where a run is pushed to.

    Attributes:
        name: Hub ID.
        revision: Branch.
        private: Whether it is to be private; None is what account or organisation have as default.
        recipe: The run's recipe, as it is pushed; None if it has none.
        onto_existing: Whether a repository that holds another run, or something else, gets a new commit.
        token: What to log in with; None for what the machine is logged in with.
        verified: Whether the Hub has been asked.
    """

    name: str
    revision: str | None
    private: bool | None
    recipe: Recipe | None
    onto_existing: bool
    token: str | None = field(default=None, repr=False)
    verified: bool = False

    def api(self) -> HfApi:
        """A client.

        Returns:
            It, with the repository's token.
        """
        return HfApi(token=self.token)

    def verify(self) -> None:
        """Ask who we are, make the repository if it is not there, and look what it holds.

        Raises:
            HubError: If we may not write there, or it holds something else.
        """
        api = self.api()
        user = _who_am_i(api)
        if "/" not in self.name:
            self.name = f"{user}/{self.name}"
        try:
            url = api.create_repo(self.name, private=self.private, exist_ok=True)
        except HFValidationError as error:
            raise HubError(f"`push_to_hub`: {self.name!r} is no name for a repository. Set `hub_model_id`") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            raise HubError(
                f"`push_to_hub`: '{user}' may not write to {self.name} ({cause(error)}). Set `hub_model_id` to a "
                f"name of your own, or use a token with write access: {_LOGIN}"
            ) from error
        self.name = url.repo_id
        self._check_content(api)
        if self.revision is not None:
            api.create_branch(self.name, branch=self.revision, exist_ok=True)
        self.verified = True

    def _check_content(self, api: HfApi) -> None:
        info = api.model_info(self.name)
        if self.private and not info.private:
            raise HubError(
                f"`hub_private_repo: true`, but {self.name} is there already and public. Make it private in its "
                "settings, or choose another `hub_model_id`"
            )
        files = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes", "README.md"}
        if not files or self.onto_existing:
            return
        other = f"{self.name} is there already and holds "
        fix = (
            "Choose another `hub_model_id`, or push onto it as a new commit with `hub_onto_existing: true`. Nothing "
            "in it was touched"
        )
        if RECIPE_FILE not in files:
            raise HubError(f"`push_to_hub`: {other}something else (it has no {RECIPE_FILE}). {fix}")
        path = hf_hub_download(self.name, RECIPE_FILE, token=self.token)
        with open(path, encoding="utf-8") as file:
            there = yaml.load(file, Loader=RecipeLoader) or {}
        changes = differences(_compared(there), _compared({} if self.recipe is None else self.recipe.values))
        if changes:
            more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise HubError(
                f"`push_to_hub`: {other}another run; its {RECIPE_FILE} differs in {'; '.join(changes[:5])}{more}. "
                f"{fix}"
            )


def claim_repository(
    args: TrainingArguments,
    script_args: LlavaScriptArguments,
    model_args: LlavaModelConfig,
    recipe: Recipe,
    *,
    resuming: bool,
) -> Repository | None:
    """Makes sure, before anything heavy is loaded, that the run can be pushed; from here on the pushing is ours.

    Args:
        args: Training arguments; `push_to_hub` is turned off in them, because transformers loses what fails.
        script_args: `hub_onto_existing`.
        model_args: The base, to say at once if nobody else will find it.
        recipe: The resolved recipe.
        resuming: Whether the run goes on from a checkpoint: then a Hub that is out of reach does not stop it.

    Returns:
        The repository, on the first process of a run that is pushed; else None.

    Raises:
        HubError: If there is no token, or it is refused or too weak, or the repository holds something else.
    """
    wanted, args.push_to_hub = args.push_to_hub, False
    if not wanted or args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    repository = Repository(
        name, args.hub_revision, args.hub_private_repo, shareable_recipe(recipe), script_args.hub_onto_existing
    )
    try:
        repository.verify()
    except UNREACHABLE as error:
        if not resuming:
            raise HubError(
                f"`push_to_hub`: the Hub cannot be reached ({cause(error)}), so it is not known whether this run can "
                "be pushed. Try again later, or start without `push_to_hub` and push with `trl-llava push` afterwards"
            ) from error
        logger.warning("The Hub cannot be reached (%s). The run goes on, and is pushed when it can be.", cause(error))
    base_model = model_args.model_name_or_path
    if base_model is not None and is_machine_path(base_model):
        logger.warning(
            "The base model is the folder %s, which others do not have: what is pushed will call it '%s'. Give a Hub "
            "ID as `model_name_or_path` if there is one.",
            base_model,
            base_model.rstrip("/").split("/")[-1],
        )
    return repository


def _who_am_i(api: HfApi) -> str:
    if is_offline_mode():
        raise HubError("`push_to_hub` needs the network, but HF_HUB_OFFLINE is set: unset one of the two")
    if api.token is None and get_token() is None:
        raise HubError(f"`push_to_hub` needs a token with write access, and there is none: {_LOGIN}")
    try:
        me = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise HubError(f"`push_to_hub`: the Hub refuses the token (wrong or expired): {_LOGIN}") from error
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"`push_to_hub`: the token of '{me['name']}' may only read. Use one with write access: {_LOGIN}"
        )
    return str(me["name"])


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(_NOT_COMPARED)}


def cause(error: BaseException) -> str:
    """What went wrong, in one line that can be shown to anybody.

    Args:
        error: What was raised on the way to the Hub.

    Returns:
        Its first line; addresses without their query, which may hold a signature.
    """
    text = str(error).strip()
    return re.sub(r"\?[^\s'\"]+", "", text.splitlines()[0]) if text else type(error).__name__
