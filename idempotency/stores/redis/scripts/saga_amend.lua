-- Change a saga that nobody runs, and make it due at once.
-- ARGV: format, id, phase or '', whether there is a result, result, entries, how many entries to delete, their names,
-- attempt and token as they were seen, attempt '' where these do not matter
-- Reply: {0} where there is no saga, it has ended, an owner runs, or it is not as it was seen; or {1}.
if not there or ended or (owned and due > now) then return {0} end
local seen = ARGV[#ARGV - 1]
-- Where an amendment is repeated, since its answer was lost, it has emptied the token itself.
if seen ~= '' and (digits(attempt) ~= seen or (token ~= '' and (owned and token or '') ~= ARGV[#ARGV])) then
  return {0}
end
local last = 6 + 3 * ARGV[6]
for at = last + 2, last + 1 + ARGV[last + 1] do
  redis.call('HDEL', key, 'e' .. ARGV[at], 'x' .. ARGV[at])
end
owned = false
redis.call('HSET', key, 'o', '0', 't', '', 'c', '0')
change(3)
call()
return {1}
