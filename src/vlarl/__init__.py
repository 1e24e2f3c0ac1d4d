"""vlarl post-trains vision-language-action policies with reinforcement learning."""
