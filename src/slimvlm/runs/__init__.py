"""From folders to folders: each stage alone, compress, studies, reports, advice."""
