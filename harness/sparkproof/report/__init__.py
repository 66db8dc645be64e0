"""The record of a run, and its views (JSON, JUnit, Markdown, HTML), made from the record alone; and the terminal."""
