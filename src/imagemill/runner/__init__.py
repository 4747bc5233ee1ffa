"""One job from start to end: open or resume, plan, launch, close."""
