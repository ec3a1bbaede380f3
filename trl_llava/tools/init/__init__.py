"""`trl-llava init`: three recipes for a folder of one's own images and rows."""
