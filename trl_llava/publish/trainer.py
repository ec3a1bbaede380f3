"""`push_to_hub` of a trainer that is used from Python: what it pushes is what the commands push."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from trl_llava.publish.model_card import write_card_of
from trl_llava.publish.repository import Repository
from trl_llava.publish.saves import PushAtSaves, push_saves


class PushesSafely(Trainer):
    """Mixed into a trainer, before TRL's: nothing it pushes is a pickle, holds a token, or names paths of the machine.

    transformers pushes `training_args.bin`, a pickle, with everything else that lies in `output_dir`, and forgets what
    fails. Here a failed push is tried again, each checkpoint has its tag, and the card is that of the commands, but
    for the samples.
    """

    stage = ""
    """The name of the stage, for the card."""

    hub_model_id: str | None
    _pushes: PushAtSaves | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure that the repository is there, and that we may write to it.

        As upstream, one that is there already gets new commits, whatever it holds.

        Args:
            token: what to log in with; by default `args.hub_token`, or what the machine is logged in with.
            private: whether a new repository is private; `args.hub_private_repo` by default.

        Raises:
            HubError: if there is no token, or it is refused or too weak.
        """
        if not self.is_world_process_zero() or self._pushes is not None:
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        token = args.hub_token if token is None else token
        repository = Repository(name, args.hub_revision, private, recipe=None, onto_existing=True, token=token)
        repository.verify()
        self._pushes = push_saves(self, repository)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model as it is now, and push it with its card; waits until it is there.

        Args:
            commit_message: title of the commit.
            blocking: must be true: what fails would not be known.
            token: as for `init_hf_repo`.
            revision: branch; `args.hub_revision` by default.
            private: as for `init_hf_repo`.
            **kwargs: for `create_model_card`.

        Returns:
            The address of the commit, `None` on other processes than the first.

        Raises:
            ValueError: if `blocking` is false.
            PushError: if the Hub does not take it, which is then in `output_dir`.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False) is not there: the process could end with nothing pushed")
        self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self._pushes is None:
            return None
        push = self._pushes.push
        if revision is not None and revision != push.repository.revision:
            push.repository.revision, push.repository.verified = revision, False
        self.create_model_card(**kwargs)
        return push.end(commit_message or "End of training")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into `args.output_dir`.

        Args:
            model_name: name in the title.
            dataset_name: Hub ID of the data.
            tags: further tags.
        """
        model = self.accelerator.unwrap_model(self.model)
        base = str(getattr(model, "policy", model).config._name_or_path)
        write_card_of(self, self.stage, base, self.args.to_dict(), model_name, dataset_name, tags)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Upstream's way; ours is the callback's.
        pass
