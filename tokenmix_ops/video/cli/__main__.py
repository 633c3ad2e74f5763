"""``python -m tokenmix_ops.video.cli``: the command, as launchers of several processes start it."""

from tokenmix_ops.video.cli import main

main()
