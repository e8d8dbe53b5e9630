"""Mistakes that several claims reject, each once: a table as in `mistakes`."""

SHARED = r"""
ctrl.advantages.continuous_gae
    infinite rate taken for 0 | if math.isinf(rate): => rate = 0.0 if math.isinf(rate) else rate\n    if False:
ctrl.advantages.temporal_differences
    discount inside the temporal difference missing | torch.exp(-discount * step_sizes) * values[:, 1:] => values[:, 1:]
    value of step i for i + 1 | * values[:, 1:] => * values[:, :-1]
ctrl.bellman.gibbs
    outer temperature missing, in gibbs | return temperature * norm => return norm
    soft-min for soft-max | H / temperature + log => -H / temperature + log
    weights of the actions missing | weights.log() => (0 * weights)
ctrl.girsanov.controls
    state at the right end of a step | x = paths.states[:, k] => x = paths.states[:, k + 1]
    time at the right end of a step | common_grid(paths).nodes[:-1] => common_grid(paths).nodes[1:]
    control not in units of the noise | sde.whiten(t, x, shift, a) => shift
ctrl.girsanov.log_ratio
    sign of the stochastic integral | return ito_sum(u, brownian) + => return -ito_sum(u, brownian) +
    Brownian motion of P taken for that of P_ref | + time_integral(0.5 * => - time_integral(0.5 *
ctrl.girsanov.path_kl
    factor 1/2 dropped | 0.5 * energy => energy
    KL off by 1 % | 0.5 * energy => 0.505 * energy
    mean over coordinates for their sum | .square().sum(-1) => .square().mean(-1)
ctrl.linear.gaussian.gaussian_kl
    Gaussian KL in the other direction | m1, S1, m0, S0 = broadcast => m0, S0, m1, S1 = broadcast
    Gaussian KL without the means | ` + shift.square()` => ``
    Gaussian KL, sign of the log-determinant | .sum(-1) - logdet) => .sum(-1) + logdet)
    Gaussian KL without 1/2 | return 0.5 * ((excess => return ((excess
ctrl.linear.gaussian_kl
    direction of the KL | m1, S1, m0, S0 = broadcast => m0, S0, m1, S1 = broadcast
ctrl.linear.kl_control._cole_hopf
    expected reward for its exponential average (noise to come ignored) | + C @ weighted => + 0 * C @ weighted
    log-partition term missing: seen in the value, not in its gradient | - 0.5 * b * logdet => ``
ctrl.linear.kl_optimal_drift
    b forgotten in the drift | G @ G.mT / b[..., None, None] => G @ G.mT
ctrl.linear.lq._entropy_reward
    entropy without its e | 2 * math.pi * math.e * safe => 2 * math.pi * safe
    1/2 of the entropy missing | 0.5 * torch.linalg.slogdet => torch.linalg.slogdet
ctrl.linear.lq.greedy
    inverse of the temperature | `covariance = temperature[..., None, None] * `
        => `covariance = 1 / temperature[..., None, None].clamp_min(0.01) * `
    policy's variance temperature * W for temperature / W | torch.cholesky_solve(eye, root) => root @ root.mT
    policy's mean halved | LinearGaussian(gains[..., :-1], => LinearGaussian(0.5 * gains[..., :-1],
    action's noise missing in W | (curvature(lq, S)) => (lq.N.expand_as(curvature(lq, S)))
    noise that the action reaches missing in the gain | (DS @ C).sum(-3) - lq.R => -lq.R
ctrl.linear.lq.value_rate
    sign of the state's cost | (C.mT @ each @ C).sum(-3) - lq.M => (C.mT @ each @ C).sum(-3) + lq.M
    1/2 of the second-order term missing | 0.5 * (s * carried) => (s * carried)
    sigma for its square | 0.5 * (s * carried) => 0.5 * (carried)
    price of drawing missing | constant - drawn + _entropy => constant + _entropy
    log-partition term missing | constant - drawn + _entropy_reward(lq, law.covariance) => constant
    sign of the entropy | - drawn + _entropy => - drawn - _entropy
ctrl.linear.tilt
    b for 1/b | S @ Qs / b[..., None, None] => S @ Qs * b[..., None, None]
    outer b missing: log-normaliser in reward instead of nats | value(m) / b) => value(m))
ctrl.markov_chain._rates
    noise of a step without its half | covariance[..., i, i] / (2 * h * h) => covariance[..., i, i] / (h * h)
ctrl.martingale.moments
    discount of test functions missing | discount_factors(problem, paths) * increments => increments
ctrl.noise.PathStreams._key
    increments and actions alike | kind, str(dtype) => str(dtype)
ctrl.noise.PathStreams._numbers
    numbers local to a batch | range(self.first_path * width, (self.first_path + paths) * width) => range(paths * width)
ctrl.noise.gauss_hermite
    h for sqrt(h) | step_sizes.sqrt()[:, None] => step_sizes[:, None]
    dt for sqrt(dt) | * step_sizes.sqrt()[:, None] => * step_sizes[:, None]
ctrl.noise_sources.Prescribed.for_action
    the same draw at every step | return self.noise.actions[:, k] => return self.noise.actions[:, 0]
ctrl.paths.over_steps
    states at the right end of a step | paths.states[:, :-1] => paths.states[:, 1:]
ctrl.returns.regularised_rewards
    entropy's sign | rewards - problem.temperature => rewards + problem.temperature
ctrl.returns.returns_to_go
    discount inside the return missing | `-discount * ` => `-0.0 * `
    terminal reward missing | terminal_rewards(problem, paths.states[:, -1]) => rewards.new_zeros(len(rewards))
ctrl.returns.running_rewards
    uneven grid taken for an even one, in the reward | steps = as_like(paths.grid.steps, paths.states)
        => steps = as_like(paths.grid.steps, paths.states).mean().expand(paths.states.shape[1] - 1)
    sqrt(dt) for dt in the reward | kept_actions(paths))) * steps => kept_actions(paths))) * steps.sqrt()
    dt missing in the reward | kept_actions(paths))) * steps => kept_actions(paths)))
ctrl.paths.time_integral
    uneven grid treated as uniform | * as_like(grid.steps, rates) => * as_like(grid.steps, rates).mean()
ctrl.policy.GaussianPolicy.act
    variance for standard deviation | alpha=float(self.std) => alpha=float(self.std) ** 2
ctrl.policy.GaussianPolicy.distribution
    variance for standard deviation in the density | Normal(mean, std, => Normal(mean, std.square(),
ctrl.policy.MultivariateGaussianPolicy.act
    scale transposed | self.scale_at(t, mean).T => self.scale_at(t, mean)
ctrl.policy.policy_kl
    KL of the policies in the other direction | policy.distribution(t, states), reference.distribution(t, states)
        => reference.distribution(t, states), policy.distribution(t, states)
ctrl.policy_gradient.DrawnActions.log_prob
    score halved | return _log_probs => return 0.5 * _log_probs
ctrl.policy_gradient._regularised_q
    entropy's sign, in regularised_q | return q - problem.temperature => return q + problem.temperature
    entropy dropped | if not problem.temperature: => if True:
ctrl.policy_gradient._summed
    sign of the score | (log_prob * advantages => (-log_prob * advantages
ctrl.q_learning.ConsistentQ.__call__
    average under the policy left out of the constraint | actions) - average - self => actions) - self
    sign of the entropy's share | - self.temperature * entropy => + self.temperature * entropy
ctrl.q_learning.GibbsQ.__call__
    temperature missing in the normalised q | self.temperature * self.policy => self.policy
ctrl.q_learning.q_rate
    HJB: sign of the discount | rate - problem.discount => rate + problem.discount
    discount V left out of q | if problem.discount: => if False:
    running reward left out of q | rate = rate + one_a_path => rate = rate + 0 * one_a_path
ctrl.sde.ControlledSDE._converted
    drift correction missing | + share * => + 0 *
    correction's sign | + share * => - share *
ctrl.sde.ControlledSDE.diffuse
    sigma transposed | "pij,pj->pi" => "pji,pj->pi"
ctrl.sde.ControlledSDE.noise_drift
    g' for g g', diagonal | return sigma * self._own_derivative => return self._own_derivative
ctrl.sde.ControlledSDE.to_stratonovich
    drift correction without 1/2 | -0.5 => -1.0
ctrl.sde.ControlledSDE.whiten
    diagonal noise not squared | sigma.masked_fill(silent, 1) => sigma.masked_fill(silent, 1).sqrt()
    sigma' for its inverse | _solve(sigma, shift.reshape(len(states), -1), t)
        => torch.einsum("pij,pi->pj", sigma, shift.reshape(len(states), -1))
    as many Brownian motions as coordinates | _solve(sigma, shift
        => _solve(sigma * (torch.arange(sigma.shape[2]).to(sigma) < sigma.shape[1]), shift
ctrl.solvers.EulerMaruyama.step_into
    drift of the next time in place | t = as_like(t0, states) => t = as_like(t1, states)
    a step of Euler-Maruyama twice as long | alpha=float(t1 - t0) => alpha=2 * float(t1 - t0)
ctrl.solvers.Heun.step
    diffusion not averaged | sde.diffuse(end, there, increment, action) => sde.diffuse(t, states, increment, action)
    predictor without noise | there = states + here => there = states + h * sde.drift_at(t, states, action)
ctrl.solvers.Milstein._correction
    dW^2 not reduced by h | (increment.square() - h) => increment.square()
    Milstein's term with the wrong sign | 0.5 * ( => -0.5 * (
ctrl.torchsde_solver._Equation.g
    diffusion for torchsde + 1 % | return sigma.reshape_as(y) if => return 1.01 * sigma.reshape_as(y) if
ctrl.transitions._sum
    mean over coordinates of the state for the sum | .sum(1) => .mean(1)
ctrl.transitions.log_prob
    along paths: log-determinant dropped | + std.log() => ``
    transition's score divided by s for s^2 | 0.5 * z.square() => 0.5 * z.square() * std
    factor 1/2 of the normal density dropped | 0.5 * z.square() => z.square()
ctrl.transitions.transition_kl
    along paths: KL without 1/2 | 0.5 * ((mean => 1.0 * ((mean
    transition's KL without 1/2 | 0.5 * ((mean => ((mean
ctrl.trust_region._integral
    mean over time for the integral | .sum(-1) => .mean(-1)
    uneven grid taken for an even one | as_like(grid.steps, rates) => as_like(grid.steps, rates).mean()
ctrl.trust_region.clipped_surrogate
    clipped always | return torch.minimum(ratio * advantage, trusted * advantage) => return trusted * advantage
    lower end of the range missing | torch.maximum(log_ratio, -half_width) => log_ratio
    ratio to first order | ratio = log_ratio.exp() => ratio = 1 + log_ratio
ctrl.value.discount_factors
    discount of test functions one step late | nodes = paths.grid.nodes[..., :-1] => nodes = paths.grid.nodes[..., 1:]
    outer discount missing | `-discount * ` => `-0.0 * `
ctrl.value.generator
    1/2 of the second derivative missing | along_drift + 0.5 * trace => along_drift + trace
    second-order term of q missing | along_drift + 0.5 * trace => along_drift
    second-order term of q without 1/2 | 0.5 * trace => trace
ctrl.value.martingale_increments
    discount missing | -discount * h => -0.0 * h
    discount doubled | -discount * h => -2 * discount * h
ctrl.value.transport
    derivative of V in time missing | torch.ones_like(t) => torch.zeros_like(t)
diffusion_envs.denoising.generation_sde
    g for g^2 | schedule.g2(s) * score => schedule.g2(s).sqrt() * score
    drift of the flow whatever eta is | 0.5 * (1 + eta**2) => 0.5
    eta ignored in the noise | return eta * schedule => return schedule
    drift of the noising process not reversed | score - sch => score + sch
    diffusion g^2 for g | x)).sqrt() => x))
diffusion_envs.denoising.tweedie_mean
    sigma for sigma^2 in the denoised state | sigma.square() => sigma
    standard deviation for variance in Tweedie's formula | sigma.square() * score => sigma * score
    signal not divided out in Tweedie's formula | ` * score) / alpha` => ` * score)`
diffusion_envs.exact.gaussian.Affine.after
    the start forgotten | self.matrix @ law.covariance @ self.matrix.mT + self.covariance => self.covariance
diffusion_envs.exact.gaussian.Quadratic.before
    variance of the state forgotten in a mean reward | - 0.5 * variance => ``
diffusion_envs.exact.gaussian.optimal_value
    log-partition term missing: V* too large | - torch.linalg.slogdet(inner)[1] => ``
diffusion_envs.exact.gaussian.score_coefficients
    score of the data's mean | schedule.alpha(s)[..., None] * data => data
    score off by 1 % | -1 / => -1.01 /
diffusion_envs.exact.gaussian.shift_response
    atan for atanh | (root * a).atanh() => (root * a).atan()
diffusion_envs.exact.gaussian.transition
    transition of the reversal | ** ((1 + eta**2) / 2) => ** 1.0
    transition of the SDE | signal ** (eta**2) => signal
diffusion_envs.exact.linear_policy.Steps.of_euler
    Euler: rates at the right end | noising_times[:-1], - => noising_times[1:], -
diffusion_envs.exact.linear_policy.chain
    recursion: shift not scaled by the step | score_gain * (offset + shift) => score_gain * offset + 0.02 * shift
diffusion_envs.exact.linear_policy.continuous_value
    score's gain of the eta family without its 1/2 | 0.5 * (1 + eta**2) => (1 + eta**2)
    full noise whatever eta is | eta**2 * g2 * unit => g2 * unit
diffusion_envs.frontier.Frontier.__init__
    prompts pooled | members.setdefault(group, []) => members.setdefault(0, [])
diffusion_envs.frontier.Frontier._tilted
    KL halved | (reward - objective) / kl_weight => 0.5 * (reward - objective) / kl_weight
diffusion_envs.noise_schedules.VE.drift_coefficient
    exploding: drift of a variance-preserving process | torch.zeros_like(s) => -0.5 * self.g2(s)
diffusion_envs.noise_schedules.VE.sigma
    exploding: data already noised | .expm1() => .exp()
diffusion_envs.noise_schedules._VariancePreserving.alpha
    alpha-bar for alpha | -0.5 * => -1.0 *
diffusion_envs.samplers.BoundDDIM.score_gain
    mean: noise not taken out of the direction | ` - self.std.square()` => ``
    DDIM: sigma for sigma^2 | self.sigma[:-1].square() => self.sigma[:-1]
diffusion_envs.samplers.BoundDDIM.state_gain
    DDIM: alpha-bar for alpha | 0.5 * self => 1.0 * self
diffusion_envs.samplers.BoundDDIM.std
    DDIM: eta ignored | self.eta * self.sigma => self.sigma
diffusion_envs.samplers.BoundDDIM.transition_kl
    KL averaged over coordinates | .flatten(1).sum(1) => .flatten(1).mean(1)
diffusion_envs.training.value_network.skip_weights
    sine and cosine exchanged | angle.cos(), angle.sin() => angle.sin(), angle.cos()
    half a turn for a quarter | 0.5 * math.pi => math.pi
verification.problems.exploratory_lq.policy
    chain rule of log s missing | lambda t: log_std.exp()
        => lambda t: log_std.detach().exp() + log_std - log_std.detach()
verification.problems.martingale.exact_value
    curvature of V + 1 % | `+ curvature * ` => `+ 1.01 * curvature * `
verification.problems.value_network.residual
    residual target without dividing by c_out | ` / out` => ``
verification.statistics.decide
    variance not paid for | 0.5 * lam**2 * variance => 0.0 * lam
diffusion_envs.objectives.path_steps.transition_log_ratio
    log-ratio averaged over coordinates | shift.square()).sum(1) => shift.square()).mean(1)
    log-ratio of transitions: 1/2 dropped | 0.5 * shift => shift
diffusion_envs.objectives.path_steps.transition_kl
    KL of rows without 1/2 | return 0.5 * => return
diffusion_envs.samplers.flow_sde.BoundFlowSDE.path_kl_gain
    KL of the time reversal | kl_factor(self.eta) * => ``
diffusion_envs.noise_schedules.FlowTable.nodes
    shift of the nodes forgotten | self.shift * u / (1 + (self.shift - 1) * u) => u
diffusion_envs.objectives.adjoint_matching.lean_adjoint
    Jacobian at the next state | states[:, k].detach() => states[:, k + 1].detach()
    reward gradient not carried back | adjoint.append(carried) => adjoint.append(adjoint[-1])
    sign of the adjoint | [-reward_gradient] => [reward_gradient]
diffusion_envs.objectives.adjoint_matching.AdjointMatching.loss
    control not in units of the noise, in loss | rows.score_gain / rows.std => rows.score_gain
    b for 1/b, in loss | / root / self.kl_weight => / root * self.kl_weight
diffusion_envs.training.value_network.martingale_loss
    steps not weighted by time | ` * step_sizes` => ``
    right end of each step | [:, :-1] => [:, 1:]
diffusion_envs.objectives.ram.ReinforceAdjointMatching.loss
    RAM: anchored at the current model | wanted = rows.reference_score + => wanted = score +
    RAM: target not held | rows.mean.detach() => rows.mean
    RAM: no baseline | -rows.noise / sigma - score => -rows.noise / sigma
    RAM: b for 1/b | rows.advantage / self.kl_weight => rows.advantage * self.kl_weight
diffusion_envs.objectives.path_steps.path_kl_rate
    path KL of full noise | `rows.kl_factor * ` => ``
diffusion_envs.environment.Environment.action
    timestep of another step | [sent(step, self.device)] => [sent(step, self.device) - 1]
"""
