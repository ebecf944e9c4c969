"""The live page as a browser gets it: HTML, CSS and ES modules, and nothing that is built or comes from elsewhere. What
the page shows is collected by `cluster.console.watch`; `cluster.console.live` serves both."""
