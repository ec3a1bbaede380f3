"""`trl-llava report`: one page that shows what a run did, or how several compare."""
