//! Turns rules that only repeat themselves into loops, which are cheaper and need no recursion.

use super::{Expr, Rule};

/// Rewrites `r ::= a r | b` as `a* b` and `r ::= r a | b` as `b a*` (Arden's lemma), so that grammars in the habit of
/// writing loops as recursion, such as `ws ::= ([ \t] ws)?`, have none.
pub(super) fn unroll(rules: &mut [Rule]) {
    for (number, rule) in rules.iter_mut().enumerate() {
        if rule.body.refers_to(number)
            && let Some(body) = as_loop(&rule.body, number)
        {
            rule.body = body;
        }
    }
}

fn as_loop(body: &Expr, rule: usize) -> Option<Expr> {
    let mut branches = Vec::new();
    branches_of(body, &mut branches);
    let (mut left, mut right, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for branch in branches {
        if !branch.refers_to(rule) {
            rest.push(branch);
            continue;
        }
        let Expr::Seq(items) = branch else { return None };
        let (side, others) = match &items[..] {
            [Expr::Rule(first), others @ ..] if *first == rule => (&mut left, others),
            [others @ .., Expr::Rule(last)] if *last == rule => (&mut right, others),
            _ => return None,
        };
        if others.is_empty() || others.iter().any(|item| item.refers_to(rule)) {
            return None;
        }
        side.push(Expr::seq(others.to_vec()));
    }
    if rest.is_empty() || left.is_empty() == right.is_empty() {
        return None;
    }
    let again = |side| Expr::Repeat(Box::new(Expr::alt(side)), 0, None);
    let rest = Expr::alt(rest);
    let items = if left.is_empty() { vec![again(right), rest] } else { vec![rest, again(left)] };
    Some(Expr::Seq(items.into_iter().filter(|item| *item != Expr::empty()).collect()))
}

/// The alternatives that a rule's body comes down to; an optional part is one or nothing.
fn branches_of(expr: &Expr, branches: &mut Vec<Expr>) {
    match expr {
        Expr::Alt(items) => items.iter().for_each(|item| branches_of(item, branches)),
        Expr::Repeat(item, 0, Some(1)) => {
            branches_of(item, branches);
            branches.push(Expr::empty());
        }
        other => branches.push(other.clone()),
    }
}
