"""What an expert is: its shapes and activation, and the reference MLP that every other computation is judged by. No
kernel, no file format and no process belongs here."""
