"""What several learners share: the training loop, optimisers, losses. No part imports a learner."""
