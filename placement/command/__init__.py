"""The planner's commands, which need files and no service, as a typer app that `expertmesh placement` takes in.

What every command of `expertmesh` shares stands here too: exit codes, errors of one line, `--json`. What a command
computes is in the folders of `placement`.
"""
