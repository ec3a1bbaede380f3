"""The repository that a run is pushed to: before training, whether we may write there and what it holds."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainingArguments

from trl_llava.configs.recipe import Recipe, RecipeLoader
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.errors import InputError
from trl_llava.hub.lookup import UNREACHABLE, first_line
from trl_llava.publish.shareable import without_paths
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
    """Where a run is pushed to, with its recipe (None for a run from Python), from which paths of the machine go."""

    name: str
    revision: str | None
    private: bool | None
    recipe: Recipe | None
    onto_existing: bool
    """Whether a repository that holds another run, or something else, gets a new commit."""
    token: str | None = field(default=None, repr=False)
    verified: bool = False

    def __post_init__(self) -> None:
        if self.recipe is not None:
            self.recipe = Recipe(without_paths(self.recipe.given), without_paths(self.recipe.defaults))

    @property
    def api(self) -> HfApi:
        """A client with the repository's token, by default the one that the machine is logged in with."""
        return HfApi(token=self.token)

    def verify(self) -> None:
        """Create the repository if it is not there, and make sure that we may write there: `HubError` if not."""
        if self.token is None and get_token() is None:
            raise HubError(f"`push_to_hub` needs a token with write access, and there is none: {_LOGIN}")
        api = self.api
        try:
            self.name = api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
            api.auth_check(self.name, write=True)  # a token may read what is there already, and no more
        except HFValidationError as error:
            raise HubError(f"`push_to_hub`: {self.name!r} is no name for a repository. Set `hub_model_id`") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            raise HubError(
                f"`push_to_hub`: the token may not write to {self.name} ({first_line(error)}). Use one with write "
                f"access: {_LOGIN}; or set `hub_model_id` to a name of your own"
            ) from error
        self._check_content()
        if self.revision is not None:
            api.create_branch(self.name, branch=self.revision, exist_ok=True)
        self.verified = True

    def _check_content(self) -> None:
        info = self.api.model_info(self.name)
        if self.private and not info.private:
            raise HubError(
                f"`hub_private_repo: true`, but {self.name} is there already and public. Make it private in its "
                "settings, or choose another `hub_model_id`"
            )
        files = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes", "README.md"}
        if not files or self.onto_existing:
            return
        what = f"something else (it has no {RECIPE_FILE})"
        if RECIPE_FILE in files:
            path = hf_hub_download(self.name, RECIPE_FILE, token=self.token)
            there = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader) or {}
            now, given = ({}, {}) if self.recipe is None else (self.recipe.values, self.recipe.given)
            changes = differences(_compared(there), _compared(now), _compared(given))
            if not changes:
                return
            more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
            what = f"another run; its {RECIPE_FILE} differs in {'; '.join(changes[:5])}{more}"
        raise HubError(
            f"`push_to_hub`: {self.name} is there already and holds {what}. Choose another `hub_model_id`, or push "
            "onto it as a new commit with `hub_onto_existing: true`. Nothing in it was touched"
        )


def claim_repository(
    args: TrainingArguments,
    script_args: LlavaScriptArguments,
    model_args: LlavaModelConfig,
    recipe: Recipe,
    *,
    resuming: bool,
) -> Repository | None:
    """Make sure, before anything heavy is loaded, that the run can be pushed; None on other processes than the first.

    `args.push_to_hub` is turned off: transformers would forget what fails. If the Hub is out of reach, a run that is
    `resuming` goes on, and a new one ends with a `HubError`.
    """
    wanted, args.push_to_hub = args.push_to_hub, False
    if not wanted or args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    onto_existing = script_args.hub_onto_existing
    repository = Repository(name, args.hub_revision, args.hub_private_repo, recipe, onto_existing)
    try:
        repository.verify()
    except UNREACHABLE as error:
        if not resuming:
            raise HubError(
                f"`push_to_hub`: the Hub cannot be reached ({first_line(error)}), so it is not known whether this run "
                "can be pushed. Try again later, or start without it, and push with `trl-llava push` afterwards"
            ) from error
        logger.warning(
            "The Hub cannot be reached (%s). The run goes on, and is pushed when it can be.", first_line(error)
        )
    if Path(base := model_args.model_name_or_path or "").is_absolute():
        logger.warning("Others do not have the base model, the folder %s: better name a Hub ID, if it has one.", base)
    return repository


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(_NOT_COMPARED)}
