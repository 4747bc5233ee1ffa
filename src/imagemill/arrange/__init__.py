"""Images in folders of files: `imagemill partition` before a job, `imagemill sort` after it."""
