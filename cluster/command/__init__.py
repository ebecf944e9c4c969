"""The command `expertmesh`: one thin module of typer declarations for each of its commands.
What they do is imported when one is called, so that help and completion come at once; it belongs to the folders
`serving`, `placement_command`, `sizing_command`, `status_command`, `check_command`, not here.
"""
