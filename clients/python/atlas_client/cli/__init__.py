"""The command `atlasctl`: one file per command group; `main` lists them and turns errors into exit codes."""
