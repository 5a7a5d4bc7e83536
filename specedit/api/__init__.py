"""One pipeline instance: installing SpecEdit on it, its call, its reports, and taking it off again."""
